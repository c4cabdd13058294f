"""Fine-tuning for captioning: the tower and the Q-Former learn from COCO's captions, the language model stays as it is.

Try it on any CPU (under a minute; random weights and drawn shapes; --llm flan_t5 for an encoder-decoder):
    python examples/run_captioning.py --recipe smoke --output_dir smoke
One GPU (the paper's 256 pairs a step are accumulated, 16 at a time; fewer: --per_device_train_batch_size 4):
    python examples/run_captioning.py --model stage2 --train_sets train.json --eval_sets val.json
Several GPUs (the released configuration of the original code has 16 pairs a GPU; the paper gives no duration):
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 16 examples/run_captioning.py \\
        --model stage2 --train_sets train.json --eval_sets val.json
train.json: [{"source": "karpathy_captions", "annotations": "dataset_coco.json", "images": "coco"}]
val.json: the same with "splits": ["val"]. Or a folder of photos with metadata.csv: --train_folder, --eval_folder.
The paper's CIDEr on COCO's Karpathy test split: OPT-2.7B 145.8, OPT-6.7B 145.2, FlanT5-XL 144.5 (ViT-g, 364 px).
Run it again to go on from the last complete checkpoint. All fields of `CaptioningArguments` and
`Blip2TrainingArguments` are options; --recipe lavis has the original code's values.
"""

from functools import partial
from pathlib import Path

from blip2_hf.training.arguments import Blip2TrainingArguments
from blip2_hf.training.captioning import CaptioningArguments, build_captioning, captioning_trainer, parse_captioning
from blip2_hf.training.runs import run, written_once


def fill_in(arguments: CaptioningArguments, training: Blip2TrainingArguments) -> None:
    """Random weights and drawn shapes for what was not given, in `output_dir`/smoke_data."""
    from random_checkpoint import save_generation_checkpoint
    from smoke_shapes import write_captions

    folder = Path(training.output_dir, "smoke_data")
    if arguments.model is None:
        family = "t5" if arguments.llm == "flan_t5" else "opt"
        write = partial(save_generation_checkpoint, family=family)
        arguments.model = written_once(folder / family, write, training)
    if arguments.train_folder is None and arguments.train_sets is None:
        arguments.train_folder = written_once(folder / "photos", write_captions, training)
        if arguments.eval_folder is None and arguments.eval_sets is None:
            arguments.eval_folder = arguments.train_folder


def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments, training = parse_captioning(argv)
    if arguments.recipe == "smoke":
        fill_in(arguments, training)
    model, processor = build_captioning(arguments, training)
    return run(captioning_trainer(model, processor, arguments, training), resume=arguments.resume)


if __name__ == "__main__":
    print(main())
