"""Small random checkpoints, for trying the package without downloading anything."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import OPTConfig, PreTrainedTokenizerFast

from blip2_hf import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2ImageProcessor,
    Blip2Processor,
)

WORDS = """
    a an the of in on at with to is are and or near under over photo picture cat dog woman man astronaut cup coffee
    spoon table space shuttle flag suit face eyes fur orange brown blue red white black small large sitting standing
    smiling looking holding wearing sleeping drinking two three many who what where how question answer : ? .
""".split()
QUERIES, WIDTH, IMAGE_SIZE = 8, 64, 112


def word_tokenizer(start: str, end: str, ends_text: bool) -> PreTrainedTokenizerFast:
    """One token per word, `start` before every text and, if wanted, `end` after it."""
    vocab = {token: number for number, token in enumerate(["<pad>", "<unk>", start, end, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = f"{start} $A {end}" if ends_text else f"{start} $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=text, special_tokens=[(start, vocab[start]), (end, vocab[end])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token="<pad>", unk_token="<unk>"
    )


def config(tokenizer: PreTrainedTokenizerFast, image_token: int | None) -> Blip2Config:
    """Everything of BLIP-2, small: 4 layers of vision, 4 of Q-Former, 2 of OPT, all 64 wide."""
    shape = {"hidden_size": WIDTH, "num_attention_heads": 4}
    # Wider initial weights than usual, so that different photos give different words.
    layers = {**shape, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 4, "initializer_range": 0.2}
    language_model = OPTConfig(
        **shape,
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        ffn_dim=2 * WIDTH,
        word_embed_proj_dim=WIDTH,
        max_position_embeddings=256,
        init_std=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Blip2Config(
        vision_config={**layers, "image_size": IMAGE_SIZE, "patch_size": 14},
        qformer_config={
            **layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "use_qformer_text_input": image_token is None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        text_config=language_model,
        num_query_tokens=QUERIES,
        image_text_hidden_size=32,
        image_token_index=image_token,
        initializer_range=0.2,
    )


def save_generation_checkpoint(folder: Path, seed: int = 0) -> None:
    """Writes a model that captions, and its processor."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer("<s>", "</s>", ends_text=False)
    processor = Blip2Processor(Blip2ImageProcessor(size=IMAGE_SIZE), tokenizer, num_query_tokens=QUERIES)
    Blip2ForConditionalGeneration(config(tokenizer, processor.image_token_id)).save_pretrained(folder)
    processor.save_pretrained(folder)


def save_retrieval_checkpoint(folder: Path, seed: int = 0) -> None:
    """Writes a model that scores images and texts, and its processor."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer("[CLS]", "[SEP]", ends_text=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "cls_token": "[CLS]", "sep_token": "[SEP]"})
    Blip2ForImageTextRetrieval(config(tokenizer, None)).save_pretrained(folder)
    Blip2Processor(Blip2ImageProcessor(size=IMAGE_SIZE), tokenizer).save_pretrained(folder)
