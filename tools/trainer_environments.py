"""Environments of JAX's trainers: their dependencies go neither together nor with ours."""

import subprocess
from pathlib import Path

PACKAGES = {
    "tunix": ["google-tunix"],
    # Later ones want protobuf 7, and tensorflow, of whose data sets gemma has its own, 6.
    "gemma": ["gemma", "sentencepiece<0.2.2"],
    "levanter": ["marin-levanter"],  # by the name of `levanter` there is one of 2023
    "kauldron": ["kauldron"],
    # EasyDeL 0.3.0 imports these without naming them, whatever the model is.
    "easydel": ["easydel", "pillow", "torch", "torchvision"],
    # MaxText 0.2.5 names none of its dependencies: these are what its imports ask for.
    "maxtext": [
        *("maxtext", "absl-py", "aqtp", "datasets", "drjax", "flax", "grain", "jax", "jaxtyping"),
        *("jinja2", "jsonlines", "ml-collections", "omegaconf", "optax", "orbax-checkpoint"),
        *("pathwaysutils", "pillow", "pydantic", "qwix", "sentencepiece", "sympy", "tensorboardx"),
        *("tiktoken", "tokamax", "transformers"),
    ],
}


def environment(trainer: str, directory: Path, make_with: str) -> str:
    """The Python of `directory/env-TRAINER`, which is made if it is not there.

    Args:
        trainer: of `PACKAGES`.
        directory: of environments.
        make_with: the Python that makes it.
    """
    at = directory / f"env-{trainer}"
    if not at.exists():
        subprocess.run([make_with, "-m", "venv", at], check=True)
        pip = [at / "bin" / "python", "-m", "pip", "install", "-q"]
        # pip 23 had not found versions for Kauldron's dependencies after two minutes.
        subprocess.run([*pip, "-U", "pip"], check=True)
        subprocess.run([*pip, *PACKAGES[trainer]], check=True)
    return str(at / "bin" / "python")
