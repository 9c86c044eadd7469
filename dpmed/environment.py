"""Versions, device and offline state: what a reader needs to tell why two runs differ."""

from __future__ import annotations

import os

PACKAGES = (
    "dpmed",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "opacus",
    "dp-accounting",
    "numpy",
    "scipy",
    "scikit-learn",
    "polars",
    "altair",
)
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
"""What keeps the Hugging Face libraries from the network."""
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars too; dpmed shows its own
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",  # tokenizers warns, and may hang, when a data loader forks
}


def prepare(*, online: bool) -> None:
    """Set the environment variables above; call it before transformers or datasets are imported.

    `online` leaves the offline variables as they are: an administrator's HF_HUB_OFFLINE=1 outlives the flag.
    """
    import warnings

    os.environ.update(QUIET if online else OFFLINE | QUIET)
    # deprecation notices from one library to another say nothing to a user
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")


def versions() -> dict[str, str]:
    """Version of Python and of each package in `PACKAGES`; "not installed" where there is none."""
    import platform

    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def device() -> str:
    """The device that training uses, e.g. "cuda: NVIDIA H200" or "cpu: x86_64, 2 threads"; imports torch."""
    import platform

    import torch

    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return "mps: Apple GPU"
    return f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"


def offline() -> bool:
    """Whether the Hugging Face libraries are kept from the network by the environment."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true")
