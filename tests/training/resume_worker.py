"""Trains in a process that is killed while it writes a checkpoint. Arguments: folder, step of that checkpoint."""

import os
import signal
import sys
from pathlib import Path


def steps_run(folder: Path, **fields):
    """A run with dropout, shuffling, random captions and augmentation, accumulation, and a log that does not go with
    the checkpoints."""
    from tiny_training import arguments, pairs, retrieval_model, trainer

    model = retrieval_model(dropout=0.1)
    args = arguments(
        folder,
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        logging_steps=3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        warmup_steps=2,
        **fields,
    )
    return trainer(model, args, pairs(16))


def main() -> None:
    folder, step = Path(sys.argv[1]), int(sys.argv[2])
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run = steps_run(folder)
    save = run._save_rng_state

    def killed_while_saving(output_dir: str) -> None:
        save(output_dir)
        if run.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    run._save_rng_state = killed_while_saving
    run.train()


if __name__ == "__main__":
    main()
