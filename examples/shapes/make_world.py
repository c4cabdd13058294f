"""The generated world as files, in the formats of COCO and VQAv2.

python examples/shapes/make_world.py --output-dir world
"""

from __future__ import annotations

import argparse
import json
import os

from blip2_hf.data.shapes.files import write_world

# Of the corpus: enough that a language model sees each text a few times only.
DOCUMENTS = {"train": 300_000, "val": 1_000}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", type=json.loads, help='scenes of each split, such as {"train": 30000, "test": 1000}')
    parser.add_argument("--documents", type=json.loads, default=DOCUMENTS, help="of the corpora, likewise")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args(argv)

    def progress(done: int, total: int) -> None:
        print(f"{done}/{total} pictures", flush=True)

    write_world(
        arguments.output_dir,
        sizes=arguments.sizes,
        documents=arguments.documents,
        seed=arguments.seed,
        processes=arguments.processes,
        progress=progress,
    )


if __name__ == "__main__":
    main()
