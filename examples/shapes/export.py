"""A trained model as it is shipped: what was frozen in half precision, the connector in float32, under 10 MB.

python examples/shapes/export.py --model runs/captioning-opt --output-dir shipped/blip2-tiny-opt

Its card (cards.py) has the numbers that the folder of the run holds, which is two above the model's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from cards import write_card
from measured import Measured
from safetensors.torch import load_file, save
from transformers.configuration_utils import PreTrainedConfig

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2Processor

MOST_BYTES = 10_000_000
_WEIGHTS = "model.safetensors"
_LANGUAGE, _TOWER, _TRAINED_NORM = "language_model.", "vision_model.", "vision_model.post_layernorm."


def stored_dtype(name: str, encoder_decoder: bool, connector: torch.dtype) -> torch.dtype:
    """Of a weight in the file: a T5 is never in float16."""
    if name.startswith(_LANGUAGE):
        return torch.bfloat16 if encoder_decoder else torch.float16
    if name.startswith(_TOWER) and not name.startswith(_TRAINED_NORM):
        return torch.float16
    return connector


def main(argv: list[str] | None = None) -> int:
    """Returns the bytes of the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a run")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--connector", choices=("float32", "float16"), default="float32", help="of what was trained")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.output_dir)
    raw, _ = PreTrainedConfig.get_config_dict(arguments.model)
    retrieval = "Blip2ForImageTextRetrieval" in (raw.get("architectures") or [])
    kind = Blip2ForImageTextRetrieval if retrieval else Blip2ForConditionalGeneration
    model = kind.from_pretrained(arguments.model, dtype=torch.float32)
    # The folder of the run means nothing elsewhere.
    for config in (model.config, model.config.vision_config, model.config.text_config, model.config.qformer_config):
        config._name_or_path = ""
    model.save_pretrained(folder)
    Blip2Processor.from_pretrained(arguments.model).save_pretrained(folder)
    stored = load_file(folder / _WEIGHTS)
    kinds = {"encoder_decoder": model.config.is_encoder_decoder, "connector": getattr(torch, arguments.connector)}
    weights = {name: tensor.to(stored_dtype(name, **kinds)) for name, tensor in stored.items()}
    (folder / _WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
    source = Path(arguments.model)
    write_card(folder, Measured(source.parent.parent), source.name)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(json.dumps({"folder": str(folder), "bytes": size, "parameters": model.num_parameters()}))
    if size > MOST_BYTES:
        raise ValueError(f"`output_dir` {folder} must stay below {MOST_BYTES} bytes, got {size}")
    return size


if __name__ == "__main__":
    main()
