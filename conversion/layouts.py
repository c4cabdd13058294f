"""The layouts of `transformers`: which of its classes a model of ours is there, its config and its tensors."""

from __future__ import annotations

from typing import Any, Literal

import torch

from blip2_hf.configuration import Blip2Config

from .steps import Target, TensorInfo

Model = Literal["retrieval", "generation"]

_CLASSES = {"retrieval": "Blip2ForImageTextRetrieval", "generation": "Blip2ForConditionalGeneration"}
_INSTRUCTBLIP = "InstructBlipForConditionalGeneration"
# The one field of ours that is kept: it tells our classes what the weights were trained with. Theirs compute with the
# epsilon of the tower's other norms.
_KEPT = "vision_layernorm_eps"


def is_question_conditioned(config: Blip2Config, model: Model) -> bool:
    """Whether it is a generation model whose Q-Former reads the question, which `transformers` calls InstructBLIP."""
    return model == "generation" and config.qformer_config.use_qformer_text_input


def for_transformers(config: Blip2Config, model: Model) -> dict[str, Any]:
    """Content of a `config.json` for `transformers`.

    Raises:
        ValueError: for a tower that its BLIP-2 does not have.
    """
    if not config.uses_eva_tower:
        raise ValueError(
            f"`--layout transformers` needs the EVA tower, the only one of its BLIP-2, got "
            f"{config.vision_config.model_type!r}"
        )
    import transformers

    ours_only = Blip2Config.__annotations__.keys() - transformers.Blip2Config().to_dict().keys() - {_KEPT}
    made = {name: value for name, value in config.to_dict().items() if name not in ours_only}
    if not is_question_conditioned(config, model):
        return {**made, "architectures": [_CLASSES[model]]}
    vision = {**made["vision_config"], "model_type": "instructblip_vision_model"}
    qformer = {**made["qformer_config"], "model_type": "instructblip_qformer"}
    del qformer["use_qformer_text_input"]
    return {
        **made,
        "model_type": "instructblip",
        "vision_config": vision,
        "qformer_config": qformer,
        "architectures": [_INSTRUCTBLIP],
    }


def transformers_target(config: Blip2Config, model: Model) -> Target:
    """Names, shapes and second names of the tensors of `transformers`' model; nothing is allocated.

    Raises:
        ValueError: as `for_transformers`.
    """
    import transformers

    content = for_transformers(config, model)
    question = is_question_conditioned(config, model)
    config_class = transformers.InstructBlipConfig if question else transformers.Blip2Config
    model_class = getattr(transformers, _INSTRUCTBLIP if question else _CLASSES[model])
    with torch.device("meta"):
        made = model_class(config_class(**content))
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in made.state_dict().items()}
    return Target(infos, dict(made.all_tied_weights_keys))
