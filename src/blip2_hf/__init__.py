"""BLIP-2 (Li et al. 2023, https://arxiv.org/abs/2301.12597) in `transformers` style.

The public names below are imported when first used: `import blip2_hf` alone loads neither torch nor
transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Blip2Config",
    "Blip2ForConditionalGeneration",
    "Blip2ForImageTextRetrieval",
    "Blip2ImageProcessor",
    "Blip2ImageToTextPipeline",
    "Blip2Processor",
    "Blip2QFormerConfig",
    "Blip2QFormerModel",
    "Blip2Trainer",
    "Blip2TrainingArguments",
    "Blip2VisionConfig",
    "Blip2VisionModel",
    "Blip2VisualQuestionAnsweringPipeline",
    "EncodedImages",
    "__version__",
    "pipeline",
    "stage1_processor",
    "stage1_tokenizer",
    "stage2_processor",
]

if TYPE_CHECKING:
    from .configuration import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
    from .image_processing import Blip2ImageProcessor
    from .modeling.encoded import EncodedImages
    from .modeling.generation import Blip2ForConditionalGeneration
    from .modeling.qformer import Blip2QFormerModel
    from .modeling.retrieval import Blip2ForImageTextRetrieval
    from .modeling.vision import Blip2VisionModel
    from .pipelines import Blip2ImageToTextPipeline, Blip2VisualQuestionAnsweringPipeline, pipeline
    from .processing import Blip2Processor
    from .stage1_processing import stage1_processor, stage1_tokenizer
    from .stage2_processing import stage2_processor
    from .training.arguments import Blip2TrainingArguments
    from .training.trainer import Blip2Trainer

# The same as the imports above, for run time; tests/test_package.py keeps the two equal.
_MODULE_OF = {
    "Blip2Config": "configuration",
    "Blip2ForConditionalGeneration": "modeling.generation",
    "Blip2ForImageTextRetrieval": "modeling.retrieval",
    "Blip2ImageProcessor": "image_processing",
    "Blip2ImageToTextPipeline": "pipelines",
    "Blip2Processor": "processing",
    "Blip2QFormerConfig": "configuration",
    "Blip2QFormerModel": "modeling.qformer",
    "Blip2Trainer": "training.trainer",
    "Blip2TrainingArguments": "training.arguments",
    "Blip2VisionConfig": "configuration",
    "Blip2VisionModel": "modeling.vision",
    "Blip2VisualQuestionAnsweringPipeline": "pipelines",
    "EncodedImages": "modeling.encoded",
    "pipeline": "pipelines",
    "stage1_processor": "stage1_processing",
    "stage1_tokenizer": "stage1_processing",
    "stage2_processor": "stage2_processing",
}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import(f"{__name__}.{module}"), name)
    globals()[name] = value  # found directly from now on
    return value


def _import(module: str) -> Any:
    """The module, imported while the garbage collector rests.

    torch and transformers make half a million objects that stay. The collector would look through them again and
    again meanwhile, for a quarter of the time. Afterwards it takes them as old, as if it had.
    """
    import gc

    if not gc.isenabled() or gc.get_freeze_count():  # someone else has plans with it
        return importlib.import_module(module)
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.unfreeze()  # into the oldest generation
        gc.enable()


def __dir__() -> list[str]:
    return sorted(__all__)
