"""Stage 1 of BLIP-2: a Q-Former learns from images and captions (contrast, matching, captioning).

Try it on any CPU (under a minute; random weights and four photos, so the losses mean nothing but must fall):
    python examples/run_stage1.py --recipe smoke --output_dir smoke
One GPU (the paper's 1680 pairs a step are accumulated, 105 at a time; fewer: --per_device_train_batch_size 42):
    python examples/run_stage1.py --vision blip2-itm-vit-g --train_folder photos --save_connector_only true
Several GPUs (the paper: 16 A100 of 40 GB, 250,000 steps, under 6 days):
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 16 examples/run_stage1.py \\
        --vision blip2-itm-vit-g --train_folder photos --save_connector_only true
Run it again to go on from the last complete checkpoint. `photos` holds images and metadata.csv (file_name,caption).
All fields of `Stage1Arguments` and `Blip2TrainingArguments` are options; --recipe lavis has the original code's values.
"""

import csv
import tempfile
from pathlib import Path

from blip2_hf.training.stage1 import build_stage1, parse_stage1, run_stage1, stage1_trainer

CAPTIONS = {
    "astronaut": ["a woman in an orange suit", "a smiling astronaut near a flag"],
    "chelsea": ["a photo of a cat", "the face of an orange cat"],
    "coffee": ["a cup of coffee on a table", "a cup and a spoon"],
    "rocket": ["a photo of a rocket", "a white rocket standing"],
}


def write_photos(folder: Path) -> None:
    """Four photos of scikit-image with two captions each, as a folder that anybody's photos could be."""
    import skimage.data
    from PIL import Image

    folder.mkdir()
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "caption"])
        for name, captions in CAPTIONS.items():
            Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.png")
            rows.writerows([f"{name}.png", caption] for caption in captions)


def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments, training = parse_stage1(argv)
    with tempfile.TemporaryDirectory(prefix="blip2-stage1-") as temporary:
        if arguments.recipe == "smoke":
            from random_checkpoint import save_retrieval_checkpoint

            if arguments.train_folder is None:
                arguments.train_folder = arguments.eval_folder = f"{temporary}/photos"
                write_photos(Path(arguments.train_folder))
            if arguments.model is None and arguments.vision is None:
                arguments.model = f"{temporary}/model"
                save_retrieval_checkpoint(Path(arguments.model))
        model, processor = build_stage1(arguments, training)
        return run_stage1(stage1_trainer(model, processor, arguments, training), resume=arguments.resume)


if __name__ == "__main__":
    print(main())
