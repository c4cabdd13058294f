"""Fine-tuning for image-text retrieval: tower and Q-Former learn with the objectives of stage 1 on larger images.

Try it on any CPU (under a minute; random weights and drawn shapes):
    python examples/run_retrieval.py --recipe smoke --output_dir smoke
One GPU (the paper's 224 pairs a step are accumulated, 14 at a time, but ITC then contrasts 14 only; for all negatives
--per_device_train_batch_size 224 --chunk_size 14):
    python examples/run_retrieval.py --model stage1 --train_sets train.json --eval_sets val.json
Several GPUs (the released configuration of the original code has 14 pairs a GPU; the paper gives no duration):
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 16 examples/run_retrieval.py \\
        --model stage1 --train_sets train.json --eval_sets val.json
train.json: [{"source": "karpathy_captions", "annotations": "dataset_coco.json", "images": "coco"}]
val.json: the same with "splits": ["val"]. Or a folder of photos with metadata.csv: --train_folder, --eval_folder.
The paper's recall at 1 on COCO's 5,000 test images: text 85.4, image 68.3 (ViT-g, 364 px); 83.5, 66.3 with ViT-L.
Run it again to go on from the last complete checkpoint. All fields of `RetrievalArguments` and
`Blip2TrainingArguments` are options; --recipe lavis has the original code's values.
"""

from pathlib import Path

from blip2_hf.training.arguments import Blip2TrainingArguments
from blip2_hf.training.retrieval import RetrievalArguments, build_retrieval, parse_retrieval, retrieval_trainer
from blip2_hf.training.runs import run, written_once


def fill_in(arguments: RetrievalArguments, training: Blip2TrainingArguments) -> None:
    """Random weights and drawn shapes for what was not given, in `output_dir`/smoke_data."""
    from random_checkpoint import save_retrieval_checkpoint
    from smoke_shapes import write_captions

    folder = Path(training.output_dir, "smoke_data")
    if arguments.model is None:
        arguments.model = written_once(folder / "model", save_retrieval_checkpoint, training)
    if arguments.train_folder is None and arguments.train_sets is None:
        arguments.train_folder = written_once(folder / "photos", write_captions, training)
        if arguments.eval_folder is None and arguments.eval_sets is None:
            arguments.eval_folder = arguments.train_folder


def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments, training = parse_retrieval(argv)
    if arguments.recipe == "smoke":
        fill_in(arguments, training)
    model, processor = build_retrieval(arguments, training)
    return run(retrieval_trainer(model, processor, arguments, training), resume=arguments.resume)


if __name__ == "__main__":
    print(main())
