"""Makes the small base model of `sani/ablation.yaml`: a causal model of 6 blocks that knows the public hospital.

python -m dpmed.recipes.sani.prepare --output_dir models/hospital-base
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from dpmed.demo_model import demo_base_model
from dpmed.errors import InputError

N_LAYERS = 6


def prepare(output_dir: Path) -> Path:
    """Train the model, or take it from the user's cache, and copy it to a new folder.

    Raises: InputError if the folder exists.
    """
    if output_dir.exists():
        raise InputError(f"{output_dir}: exists already; name a new folder, or delete it")
    folder = demo_base_model(n_layers=N_LAYERS)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, output_dir)
    return output_dir


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prepare.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", required=True, type=Path, help="a new folder for the model")
    try:
        print(prepare(parser.parse_args(arguments).output_dir))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
