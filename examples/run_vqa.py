"""Fine-tuning for visual question answering: the Q-Former reads the question too, the language model stays as it is.

Try it on any CPU (under a minute; random weights and drawn shapes; --llm flan_t5 for an encoder-decoder):
    python examples/run_vqa.py --recipe smoke --output_dir smoke
One GPU (the paper's 128 questions a step are accumulated, 8 at a time; fewer: --per_device_train_batch_size 2):
    python examples/run_vqa.py --model stage2 --text_branch stage1 --train_sets train.json --eval_sets val.json
Several GPUs (the paper gives no duration):
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 16 examples/run_vqa.py \\
        --model stage2 --text_branch stage1 --train_sets train.json --eval_sets val.json
train.json: [{"source": "vqa_questions", "questions": "v2_OpenEnded_mscoco_train2014_questions.json",
  "annotations": "v2_mscoco_train2014_annotations.json", "images": "train2014"}, the same for val2014,
  {"source": "visual_genome_questions", "annotations": "question_answers.json", "images": "vg"}]
Or a folder of photos with metadata.csv (file_name,question,answer): --train_folder, --eval_folder.
The paper's accuracy on VQAv2 test-dev: OPT-2.7B 81.59, OPT-6.7B 82.19, FlanT5-XL 81.55 (ViT-g, 490 px).
Run it again to go on from the last complete checkpoint. All fields of `VqaArguments` and `Blip2TrainingArguments` are
options. The original code has no recipe for it.
"""

from functools import partial
from pathlib import Path

from blip2_hf.training.arguments import Blip2TrainingArguments
from blip2_hf.training.runs import run, written_once
from blip2_hf.training.vqa import VqaArguments, build_vqa, parse_vqa, vqa_trainer


def fill_in(arguments: VqaArguments, training: Blip2TrainingArguments) -> None:
    """Random weights and drawn shapes for what was not given, in `output_dir`/smoke_data."""
    from random_checkpoint import save_generation_checkpoint, save_retrieval_checkpoint
    from smoke_shapes import write_questions

    folder = Path(training.output_dir, "smoke_data")
    if arguments.model is None:
        family = "t5" if arguments.llm == "flan_t5" else "opt"
        write = partial(save_generation_checkpoint, family=family)
        arguments.model = written_once(folder / family, write, training)
        if arguments.text_branch is None:
            arguments.text_branch = written_once(folder / "stage1", save_retrieval_checkpoint, training)
    if arguments.train_folder is None and arguments.train_sets is None:
        arguments.train_folder = written_once(folder / "photos", write_questions, training)
        if arguments.eval_folder is None and arguments.eval_sets is None:
            arguments.eval_folder = arguments.train_folder


def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments, training = parse_vqa(argv)
    if arguments.recipe == "smoke":
        fill_in(arguments, training)
    model, processor = build_vqa(arguments, training)
    return run(vqa_trainer(model, processor, arguments, training), resume=arguments.resume)


if __name__ == "__main__":
    print(main())
