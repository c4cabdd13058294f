"""What a folder needs beside its weights: config, processor with tokenizers, generation config, model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2_hf.checkpoint_facts import read_json
from blip2_hf.checkpoints import path_or_id
from blip2_hf.model_card import model_card_text, write_model_card
from blip2_hf.stage1_processing import has_tokenizer, image_side, stage1_tokenizer
from blip2_hf.stage2_processing import language_tokenizer, text_end

if TYPE_CHECKING:
    from transformers.generation.configuration_utils import GenerationConfig

    from blip2_hf.configuration import Blip2Config
    from blip2_hf.processing import Blip2Processor

    from .steps import TensorInfo

_RETRIEVAL = "Blip2ForImageTextRetrieval"
BERT = "bert-base-uncased"
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Extras:
    """The small files of a folder.

    Attributes:
        config: content of `config.json`.
        processor: None if the source has none.
        generation: None for a model that has no language model.
        card: text of the README.md.
    """

    config: Mapping[str, Any]
    processor: Blip2Processor | None
    generation: GenerationConfig | None
    card: str

    def write(self, folder: Path) -> None:
        """Puts the files into `folder`."""
        text = json.dumps(self.config, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        if self.generation is not None:
            self.generation.save_pretrained(folder)
        write_model_card(folder, self.card)


def processor_for_original(config: Blip2Config, model_class: str, llm: str | None, text: str | None) -> Blip2Processor:
    """The processor of a model that came as a `.pth` file, which has none.

    Pictures are resized to the square that the tower's positions are for, with CLIP's mean and standard deviation, as
    the original does it with every tower.

    Args:
        llm: folder or Hub id of the language model, for its tokenizer, which gets the image placeholder.
        text: folder or Hub id of a BERT, for its tokenizer, which gets `[DEC]`; None: `bert-base-uncased`.

    Raises:
        ValueError: if there is no tokenizer, or one whose ids are not those of the config.
        OSError: for a name that is neither a folder nor on the Hub.
    """
    from blip2_hf.image_processing import Blip2ImageProcessor
    from blip2_hf.processing import Blip2Processor

    images = Blip2ImageProcessor(size=image_side(config.vision_config))
    reads_text = config.qformer_config.use_qformer_text_input
    words = _with_argument("--text", stage1_tokenizer, BERT if text is None else text) if reads_text else None
    if model_class == _RETRIEVAL:
        if words.bos_token_id != config.qformer_config.decoder_start_token_id:
            raise ValueError(
                f"`--text` {text or BERT} has [DEC] as token {words.bos_token_id}, the Q-Former as token "
                f"{config.qformer_config.decoder_start_token_id}"
            )
        return Blip2Processor(images, words)
    placeholder = config.image_token_index
    tokenizer = _with_argument("--llm", language_tokenizer, llm) if placeholder is not None else _plain(llm)
    processor = Blip2Processor(
        images,
        tokenizer,
        num_query_tokens=None if placeholder is None else config.num_query_tokens,
        qformer_tokenizer=words,
        is_encoder_decoder=bool(config.is_encoder_decoder),
        suffix_end=text_end(tokenizer, config.text_config.model_type),
    )
    if len(tokenizer) > config.text_config.get_text_config().vocab_size:
        raise ValueError(
            f"`--llm` {llm} has {len(tokenizer)} tokens, the image placeholder included, the model's vocabulary "
            f"{config.text_config.get_text_config().vocab_size}"
        )
    if processor.image_token_id != placeholder:
        raise ValueError(
            f"`--llm` {llm} has the image placeholder as token {processor.image_token_id}, the config as token "
            f"{placeholder}"
        )
    return processor


def processor_of(source: str) -> Blip2Processor | None:
    """The processor of a folder or Hub id; None if it has none."""
    from blip2_hf.processing import Blip2Processor

    if not any(read_json(source, name) for name in _PROCESSOR_FILES) or not has_tokenizer(source):
        return None
    return Blip2Processor.from_pretrained(source)


def generation_config(config: Blip2Config, source: str | None, processor: Blip2Processor | None) -> GenerationConfig:
    """That of the source, else the special tokens of the language model's config; OPT ends with a line break."""
    from transformers.generation.configuration_utils import GenerationConfig

    if source is not None and read_json(source, "generation_config.json"):
        return GenerationConfig.from_pretrained(source)
    text = config.text_config.get_text_config()
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    tokens = {name: getattr(config.text_config, name, None) for name in names}
    tokens = {name: getattr(text, name, None) if value is None else value for name, value in tokens.items()}
    if processor is not None:
        if tokens["eos_token_id"] is None or source is None:
            tokens["eos_token_id"] = processor.suffix_end_id
        if tokens["pad_token_id"] is None:
            tokens["pad_token_id"] = processor.tokenizer.pad_token_id
    return GenerationConfig(**{name: value for name, value in tokens.items() if value is not None})


def model_card(
    config: Blip2Config, model_class: str, infos: Mapping[str, TensorInfo], checkpoint: str | None, repo_id: str | None
) -> str:
    """The README.md.

    Args:
        infos: shapes of the tensors under our names, for the numbers of parameters.
        checkpoint: Hub id of the released checkpoint that the weights are; None: unknown.
    """
    counts: dict[str, int] = {}
    for name, info in infos.items():
        part = name.split(".", 1)[0]
        part = part if part in ("vision_model", "language_model") else "qformer"
        counts[part] = counts.get(part, 0) + info.nbytes // info.dtype.itemsize
    before, config._name_or_path = config._name_or_path, checkpoint or ""
    try:
        return model_card_text(config, model_class=model_class, repo_id=repo_id, parameter_counts=counts)
    finally:
        config._name_or_path = before


def _plain(llm: str | None) -> Any:
    """A language model's tokenizer as it is, for a model without a placeholder."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    source = path_or_id("--llm", llm)
    if not has_tokenizer(source):
        raise ValueError(f"`--llm` {source} has no tokenizer")
    return AutoTokenizer.from_pretrained(source)


def _with_argument(argument: str, make: Any, name: str | None) -> Any:
    """What `make(name)` gives; its errors name our command's argument."""
    path_or_id(argument, name)
    try:
        return make(name)
    except ValueError as error:
        said = re.sub("`(language|text)`", f"`{argument}`", str(error))
        raise ValueError(said) from error
