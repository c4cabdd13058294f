"""Stage 2 of BLIP-2: the Q-Former of stage 1 learns to speak to a frozen language model.

Try it on any CPU (under a minute; random weights and drawn shapes; --llm flan_t5 for an encoder-decoder):
    python examples/run_stage2.py --recipe smoke --output_dir smoke
One GPU (the paper's 1920 pairs a step, FlanT5 1520, are accumulated, 120 at a time; fewer:
--per_device_train_batch_size 40):
    python examples/run_stage2.py --stage1 stage1 --language facebook/opt-2.7b --train_folder photos \\
        --save_connector_only true
Several GPUs (the paper: 16 A100 of 40 GB, 80,000 steps, under 3 days with ViT-g and FlanT5-XXL):
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 16 examples/run_stage2.py \\
        --stage1 stage1 --language google/flan-t5-xl --train_folder photos --save_connector_only true
The paper's scores on VQAv2 test-dev without fine-tuning: OPT-2.7B 52.3, FlanT5-XL 63.0, FlanT5-XXL 65.0 (ViT-g).
Run it again to go on from the last complete checkpoint. `photos` holds images and metadata.csv (file_name,caption).
All fields of `Stage2Arguments` and `Blip2TrainingArguments` are options; --recipe lavis has the original code's values.
"""

from functools import partial
from pathlib import Path

from blip2_hf.training.arguments import Blip2TrainingArguments
from blip2_hf.training.runs import run, written_once
from blip2_hf.training.stage2 import Stage2Arguments, build_stage2, parse_stage2, stage2_trainer


def fill_in(arguments: Stage2Arguments, training: Blip2TrainingArguments) -> None:
    """Random weights and drawn shapes for what was not given, in `output_dir`/smoke_data."""
    from random_checkpoint import save_language_checkpoint, save_retrieval_checkpoint
    from smoke_shapes import write_captions

    folder = Path(training.output_dir, "smoke_data")
    if arguments.model is None and arguments.language is None:
        family = "t5" if arguments.llm == "flan_t5" else "opt"
        if arguments.stage1 is None and arguments.vision is None:
            arguments.stage1 = written_once(folder / "stage1", save_retrieval_checkpoint, training)
        write = partial(save_language_checkpoint, family=family)
        arguments.language = written_once(folder / family, write, training)
    if arguments.train_folder is None and arguments.train_sets is None:
        arguments.train_folder = written_once(folder / "photos", write_captions, training)
        if arguments.eval_folder is None and arguments.eval_sets is None:
            arguments.eval_folder = arguments.train_folder


def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments, training = parse_stage2(argv)
    if arguments.recipe == "smoke":
        fill_in(arguments, training)
    model, processor = build_stage2(arguments, training)
    return run(stage2_trainer(model, processor, arguments, training), resume=arguments.resume)


if __name__ == "__main__":
    print(main())
