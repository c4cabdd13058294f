"""Settings that every test relies on. The environment comes first: the libraries read it when imported."""

import os
import tempfile

# An empty cache, so that a developer's own checkpoints or token cannot change what a test sees.
_HF_HOME = tempfile.TemporaryDirectory(prefix="blip2-hf-tests-")
os.environ["HF_HOME"] = _HF_HOME.name
for _name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN_PATH"):
    os.environ.pop(_name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "warning"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more only slow tiny models down

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random weights and inputs are the same in every run, whatever ran before."""
    torch.manual_seed(0)
