"""Resuming: bit for bit, after SIGKILL in the middle of writing a checkpoint."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from blip2_hf.data.collator import ImageTextCollator
from blip2_hf.data.streaming import StreamingPairs
from blip2_hf.training.checkpoints import is_complete, last_complete_checkpoint
from tiny_sets import tiny_shards
from tiny_training import arguments, logged, pairs, random_pair, retrieval_model, trainer

WORKER = Path(__file__).with_name("resume_worker.py")
NAMES = ("loss", "loss_itc", "loss_itm", "loss_itg", "temperature", "grad_norm", "learning_rate", "epoch")


def steps_run(folder: Path, **fields):
    spec = importlib.util.spec_from_file_location("resume_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return worker.steps_run(folder, **fields)


def assert_same_run(first: Path, second: Path, step: int) -> None:
    """Weights and optimiser of two checkpoints, bit for bit."""
    weights = [load_file(folder / f"checkpoint-{step}" / "model.safetensors") for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    states = [torch.load(folder / f"checkpoint-{step}" / "optimizer.pt") for folder in (first, second)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert len(states[0]["state"]) > 10
    for number, state in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][number][key]) for key, value in state.items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole")
    run = steps_run(folder)
    run.train()
    return folder, run


def test_killed_while_saving(tmp_path, uninterrupted) -> None:
    whole_folder, whole = uninterrupted
    tests = str(WORKER.parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(tests).parent / "src"), tests])}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), "6"], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    # checkpoint 6 has everything but its end; what `Trainer` would take for the last one
    assert (tmp_path / "checkpoint-6" / "optimizer.pt").is_file()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-6")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")

    resumed = steps_run(tmp_path)
    with pytest.raises(ValueError, match="checkpoint-6 is not a complete checkpoint"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, *NAMES) == logged(whole, *NAMES)
    assert [step for step, *_ in logged(whole)] == [3, 6]
    assert is_complete(tmp_path / "checkpoint-6")
    assert_same_run(whole_folder, tmp_path, 8)


def test_another_random_state_gives_another_run(tmp_path, uninterrupted) -> None:
    """The comparison above could fail: without the random state, dropout is another."""
    folder, whole = uninterrupted
    run = steps_run(tmp_path)
    run._load_rng_state = lambda checkpoint: None
    run.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert logged(run, *NAMES)[-1] != logged(whole, *NAMES)[-1]


def test_resume_within_a_later_epoch(tmp_path) -> None:
    """accelerate does not tell the dataset its epoch after skipping batches."""
    seen: dict[str, list[int]] = {"whole": [], "resumed": []}

    def collator(name: str):
        def collate(samples):
            seen[name].extend(sample["input_ids"][1] for sample in samples)
            return ImageTextCollator(pad_token_id=0)(samples)

        return collate

    fields = {"max_steps": 7, "save_strategy": "steps", "save_steps": 5}
    whole = trainer(
        retrieval_model(), arguments(tmp_path, **fields), pairs(12), data_collator=collator("whole")
    )  # 3 steps an epoch
    whole.train()
    again = trainer(retrieval_model(), arguments(tmp_path, **fields), pairs(12), data_collator=collator("resumed"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.train_dataset.epoch == 2
    assert seen["resumed"][:4] == seen["whole"][20:24]
    assert logged(again, *NAMES) == logged(whole, *NAMES)


def stream_run(folder: Path, **fields):
    stream = StreamingPairs(tiny_shards([5, 7, 6]), random_pair, shuffle_buffer=4)
    args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=4, logging_steps=1, **fields)
    return trainer(retrieval_model(dropout=0.1), args, stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_go_on_where_they_were(tmp_path, workers: int) -> None:
    fields = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "dataloader_num_workers": workers}
    whole = stream_run(tmp_path / "whole", **fields)
    whole.train()
    resumed = stream_run(tmp_path / "again", **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert logged(resumed, *NAMES) == logged(whole, *NAMES)
    assert len(logged(whole)) == 6 and len({loss for _, loss in logged(whole, "loss")}) == 6
    for (name, first), second in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name


def test_streams_are_not_skipped_over(tmp_path) -> None:
    run = stream_run(tmp_path)
    run.train()
    resumed = stream_run(tmp_path)
    reads = resumed.train_dataset.shards
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert reads.read_entries < 4 * (2 + 1) + 2 * 4 + 5  # two steps, one batch ahead, one window read again


def test_a_stream_needs_its_position(tmp_path) -> None:
    run = stream_run(tmp_path)
    run.train()
    for path in (tmp_path / "checkpoint-4").glob("blip2_progress_*.json"):
        path.unlink()
    with pytest.raises(ValueError, match="no position of process 0"):
        stream_run(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_nothing_to_resume_from(tmp_path) -> None:
    run = trainer(retrieval_model(), arguments(tmp_path, max_steps=1), pairs(4))
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        run.train(resume_from_checkpoint=True)
