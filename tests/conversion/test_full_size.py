"""Every released checkpoint at full size, by names and shapes: nothing is allocated, no key is unexplained."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from blip2_hf.checkpoints import CHECKPOINTS
from blip2_hf.configuration import Blip2Config
from conversion.configs import config_for, original_vocabulary
from conversion.detect import Detected, detect
from conversion.steps import Conversion, How, TensorInfo, apply, plan
from conversion.tables import reading_table, writing_table
from lavis_names import original_state_dict, stage_2_state_dict
from original_keys import (
    clip_file,
    eva_file,
    in_original_file,
    infos,
    language_folder,
    original_file,
    target,
    without_text,
)

WHOLE = [name for name, entry in CHECKPOINTS.items() if entry.image_size == 364]  # the tower was trained, too
TOWER_FILES = {"eva": ("tower_eva", eva_file), "clip": ("tower_clip", clip_file)}


@cache
def found(name: str) -> Detected:
    return detect(infos(original_file(name)), file_name=CHECKPOINTS[name].original_file)


@cache
def sources(name: str) -> dict[str, TensorInfo]:
    """The checkpoint's file, the tower's where it holds none, and the language model's folder."""
    together = infos(original_file(name), "bridge")
    if not found(name).has_tower:
        together |= infos(TOWER_FILES[found(name).tower][1](), "tower")
    if found(name).language is not None:
        together |= infos(language_folder(Blip2Config.for_checkpoint(name)), "llm")
    return together


@cache
def converted(name: str) -> Conversion:
    layers = config_for(found(name)).vision_feature_index()
    tower = None if found(name).has_tower else TOWER_FILES[found(name).tower][0]
    table = reading_table(found(name).kind, layers, tower, found(name).language)
    return plan(table, sources(name), "to_ours", target(name))


def shapes_of_ours(conversion: Conversion) -> dict[str, tuple[int, ...]]:
    shapes = {step.target: step.shape for step in conversion.steps}
    return shapes | {second: shapes[first] for second, first in conversion.tied.items()}


def accounted(conversion: Conversion) -> set[str]:
    return {name for step in conversion.steps for name in step.inputs} | set(conversion.dropped)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_original_file_becomes_exactly_our_model(name):
    conversion = converted(name)
    expected = {key: info.shape for key, info in target(name).infos.items()}
    assert shapes_of_ours(conversion) == expected
    assert accounted(conversion) == set(sources(name))
    assert not conversion.absent
    assert set(conversion.generated) == set()


@pytest.mark.parametrize("name", ["blip2-opt-6.7b", "blip2-flan-t5-xl-vit-l", "blip2-itm-vit-g-coco"])
def test_steps_make_the_shapes_that_were_planned(name):
    tensors = {key: torch.empty(info.shape, dtype=info.dtype, device="meta") for key, info in sources(name).items()}
    for step in converted(name).steps:
        made = apply(step, tensors.__getitem__)
        assert (tuple(made.shape), made.dtype) == (step.shape, step.dtype), step


def test_files_are_detected():
    assert {name: found(name).checkpoint for name in CHECKPOINTS} == {name: name for name in CHECKPOINTS}
    assert {name for name in CHECKPOINTS if found(name).has_tower} == set(WHOLE)


def test_dropped_is_what_the_original_does_not_use():
    dropped = converted("blip2-opt-2.7b").dropped
    blocks = {key: why for key, why in dropped.items() if key.startswith("tower:blocks.39.")}
    assert len(blocks) == 13 and set(blocks.values()) == {"last block, whose output BLIP-2 does not use"}
    others = set(dropped) - set(blocks)
    behind = {f"tower:{part}.{p}" for part in ("norm", "head") for p in ("weight", "bias")}
    assert others == behind | {"bridge:opt_model.lm_head.weight", "bridge:Qformer.bert.embeddings.position_ids"}


def test_vocabulary_grows_for_the_placeholder():
    grown = [step for step in converted("blip2-opt-6.7b").steps if step.how is How.GROWN]
    assert [(step.target, step.shape) for step in grown] == [
        ("language_model.model.decoder.embed_tokens.weight", (50304, 4096))
    ]
    assert not any(step.how is How.GROWN for step in converted("blip2-flan-t5-xl").steps)
    assert not any(step.how is How.GROWN for step in converted("blip2-opt-2.7b-coco").steps)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_back_to_the_original_file(name):
    """The very names and shapes, with the tower and without; the language model's second names cut to its own size."""
    detected = found(name)
    ours = {f"bridge:{key}": info for key, info in target(name).infos.items()}
    table = writing_table("lavis", detected.language, with_tower=detected.has_tower, with_language_model=False)
    vocabulary = original_vocabulary(Blip2Config.for_checkpoint(name)) if detected.language else None
    conversion = plan(table, ours, "from_ours", vocabulary=vocabulary)
    expected = {key: info.shape for key, info in infos(original_file(name)).items()}
    assert {step.target: step.shape for step in conversion.steps} == expected
    assert accounted(conversion) == set(ours)


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_stage_2_files_are_stage_1_files_without_what_texts_use(language):
    """The rule by which `original_keys` makes full-size stage-2 files, on the original's own small models."""
    tower = {name for name in original_state_dict() if name.startswith("visual_encoder.")}
    expected = {name for name in stage_2_state_dict(language) if in_original_file(name)}
    derived = set(without_text(original_state_dict())) - tower
    again = {name for name in expected if name.startswith(f"{language}_")}
    assert derived == expected - again
    assert len(again) == {"opt": 3, "t5": 4}[language]


# -- what must not pass ------------------------------------------------------------------------------------------------


def replan(changed: dict[str, TensorInfo], name: str = "blip2-flan-t5-xl") -> Conversion:
    return plan(reading_table("lavis_stage2", 39, "tower_eva", "t5"), changed, "to_ours", target(name))


def test_a_surplus_key_is_listed():
    known = sources("blip2-flan-t5-xl")
    extra = {f"tower:blocks.{n}.gamma_1": TensorInfo((1408,), torch.float16) for n in range(40)}
    with pytest.raises(ValueError, match=r"39 keys of the source are not in the table: tower:blocks.\{0…38\}.gamma_1$"):
        replan(known | extra)
    surplus = {"llm:extra.weight": TensorInfo((1,), torch.float32)}
    with pytest.raises(ValueError, match="1 keys that the target has no place for: language_model.extra.weight"):
        replan(known | surplus)


def test_missing_parts_are_listed():
    without_tower = {key: info for key, info in sources("blip2-flan-t5-xl").items() if not key.startswith("tower:")}
    with pytest.raises(ValueError, match=r"472 keys which no source has: .*encoder.layers.\{0…38\}.mlp.fc1.weight"):
        replan(without_tower)
    one_less = dict(sources("blip2-flan-t5-xl"))
    del one_less["llm:decoder.block.7.layer.2.DenseReluDense.wo.weight"]
    with pytest.raises(
        ValueError, match=r"^1 keys which no source has: language_model.decoder.block.7.layer.2.D[^,;]*$"
    ):
        replan(one_less)


def test_another_language_model_is_refused():
    changed = dict(sources("blip2-flan-t5-xl")) | infos(
        language_folder(Blip2Config.for_checkpoint("blip2-flan-t5-xxl")), "llm"
    )
    with pytest.raises(
        ValueError, match=r"keys of another shape: .*shared.weight \[32128, 4096\] instead of \[32128, 2048\]"
    ):
        replan(changed)


def test_a_smaller_image_size_is_refused():
    with pytest.raises(ValueError, match=r"position_embedding \[1, 257, 1408\] instead of \[1, 677, 1408\]"):
        replan(sources("blip2-flan-t5-xl"), "blip2-flan-t5-xl-coco")
