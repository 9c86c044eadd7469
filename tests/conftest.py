"""What all tests share: no network, one thread, caches that vanish, tiny models made on the spot."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Set before torch, transformers and datasets are imported: they read these once.
_CACHE = tempfile.mkdtemp(prefix="dpmed-tests-")
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": _CACHE,
        "HF_HUB_CACHE": f"{_CACHE}/hub",
        "HF_DATASETS_CACHE": f"{_CACHE}/datasets",
        "HF_MODULES_CACHE": f"{_CACHE}/modules",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DPMED_LEDGER": "none",  # a run then keeps its charges in its own folder; tests of the ledger name their own
    }
)

hypothesis.settings.register_profile("local", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the caches of this process."""
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with all special tokens; shared, so do not change it."""
    import tiny_models

    return tiny_models.make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_models.make_model`: a fresh two-layer model at each call, as `tiny_model("llama")`."""
    import tiny_models

    return tiny_models.make_model
