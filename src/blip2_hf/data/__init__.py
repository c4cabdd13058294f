"""Image-text pairs for training: sources, augmentation, mixing, streaming."""

from .captions import normalise_caption, normalise_question
from .collator import ImageTextCollator, PairTransform
from .columns import DatasetSamples, parquet_samples
from .mixing import ConcatPairs, MixedPairs
from .pairs import ImageTextPairs
from .samples import ImageTextSample, one_sample_per_caption, stable_id
from .shards import DatasetShards, TarShards
from .sources import (
    annotation_list,
    caption_table,
    coco_captions,
    image_folder,
    karpathy_captions,
    visual_genome_regions,
)
from .stream_mixing import MixedStreams
from .streaming import StreamingPairs
from .training_sets import training_set

__all__ = [
    "ConcatPairs",
    "DatasetSamples",
    "DatasetShards",
    "ImageTextCollator",
    "ImageTextPairs",
    "ImageTextSample",
    "MixedPairs",
    "MixedStreams",
    "PairTransform",
    "StreamingPairs",
    "TarShards",
    "annotation_list",
    "caption_table",
    "coco_captions",
    "image_folder",
    "karpathy_captions",
    "normalise_caption",
    "normalise_question",
    "one_sample_per_caption",
    "parquet_samples",
    "stable_id",
    "training_set",
    "visual_genome_regions",
]
