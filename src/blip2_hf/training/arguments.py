"""`TrainingArguments` with what BLIP-2 adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .precision import HALF_PRECISIONS


@dataclass
class Blip2TrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with further fields and four other defaults.

    Other defaults: `adam_beta2` 0.98 and `weight_decay` 0.05 (Li et al. 2023, sec. 3.4); `remove_unused_columns` False,
    as samples have columns that are no arguments of the model; `logging_nan_inf_filter` False, as it makes the device
    wait at every step and hides losses that are not finite. `data_seed` is `seed` unless given, so that all processes
    draw the same order.

    Attributes:
        layer_decay: learning rate of block i of an unfrozen vision tower of `depth` blocks is lr · d^(depth+1−i), of
            its embeddings lr · d^(depth+1); the rest of the model has lr. 1.0: no decay.
        frozen_vision_dtype: "float16" or "bfloat16": precision of the frozen vision tower, without `post_layernorm`,
            which is trained; None: as the model was loaded.
        save_connector_only: checkpoints hold what was trained and the name of the checkpoint that the rest came from
            (`save_pretrained(connector_only=True)`). A model that came from no checkpoint is saved in full.
        chunk_size: representation learning holds the activations of only so many pairs at a time, computing them again
            in the backward pass; the gradient is that of the whole batch. None: of all.

    Raises:
        ValueError: for values out of their range, naming the argument.
    """

    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay (not for biases, norms, temperature)."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False for our collators."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace losses that are not finite in the log; waits for the device."}
    )
    layer_decay: float = field(default=1.0, metadata={"help": "Layer-wise learning rate decay of an unfrozen tower."})
    frozen_vision_dtype: str | None = field(
        default=None, metadata={"help": "Precision of the frozen tower: float16 or bfloat16."}
    )
    save_connector_only: bool = field(
        default=False, metadata={"help": "Checkpoints without the frozen parts that came from a checkpoint."}
    )
    chunk_size: int | None = field(
        default=None, metadata={"help": "Pairs whose activations are held at a time; None: all."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"`layer_decay` must be above 0 and at most 1, got {self.layer_decay!r}")
        if self.frozen_vision_dtype is not None and self.frozen_vision_dtype not in HALF_PRECISIONS:
            raise ValueError(
                f"`frozen_vision_dtype` must be one of {', '.join(HALF_PRECISIONS)} or None, got "
                f"{self.frozen_vision_dtype!r}"
            )
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"`chunk_size` must be a positive integer or None, got {self.chunk_size!r}")
        if self.data_seed is None:
            self.data_seed = self.seed
        super().__post_init__()
