"""Captions and scores two photos with small random models, without downloading anything.

Command: `make demo` (or `python examples/demo.py`). Hardware: any CPU. Duration: seconds after the imports.
Expected result: meaningless words and scores, for the weights are random; what it shows is that everything runs.
"""

import tempfile
from pathlib import Path

import skimage.data
import torch
from PIL import Image
from random_checkpoint import save_generation_checkpoint, save_retrieval_checkpoint
from transformers.utils import logging

from blip2_hf import Blip2ForImageTextRetrieval, Blip2Processor, pipeline

# Both come with scikit-image and need no download: a photo of NASA (public domain) and one of a cat (CC0).
PHOTOS = {"astronaut": skimage.data.astronaut, "chelsea": skimage.data.chelsea}
TEXTS = ["a photo of a woman in a suit", "a photo of a cat"]


def main() -> int:
    logging.disable_progress_bar()
    print("The weights of these models are RANDOM: the words and scores below mean nothing.")
    print("Real ones (a download of several GB): blip2 caption photo.jpg --model blip2-opt-2.7b\n")
    with tempfile.TemporaryDirectory(prefix="blip2-demo-") as temporary:
        generation, retrieval = Path(temporary, "generation"), Path(temporary, "retrieval")
        save_generation_checkpoint(generation)
        save_retrieval_checkpoint(retrieval)
        photos = {name: Image.fromarray(load()) for name, load in PHOTOS.items()}

        describe = pipeline("image-to-text", model=generation, prompt="a photo of", batch_size=2)
        captions = describe(list(photos.values()), generate_kwargs={"num_beams": 5, "max_new_tokens": 8})

        answer = pipeline("visual-question-answering", model=describe.model, processor=describe.processor)
        model = Blip2ForImageTextRetrieval.from_pretrained(retrieval).eval()
        processor = Blip2Processor.from_pretrained(retrieval)
        words = processor(text=TEXTS, return_tensors="pt")

        for (name, photo), caption in zip(photos.items(), captions, strict=True):
            print(f"{name} ({photo.width}x{photo.height})")
            print(f"  caption: a photo of {caption[0]['generated_text']}")
            question = "what is in the picture ?"
            print(f"  {question} {answer(photo, question)[0]['answer']}")
            with torch.no_grad():
                image = model.encode_image(**processor(images=photo, return_tensors="pt"))  # once, for both scores
                cosines = model(image_embeds=image, **words).logits_per_image[0]
                matches = model.match_matrix(image, **words)[0].softmax(dim=-1)[:, 1]
            for text, cosine, match in zip(TEXTS, cosines.tolist(), matches.tolist(), strict=True):
                print(f"  ITC cosine {cosine:6.3f}   ITM probability {match:.3f}   {text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
