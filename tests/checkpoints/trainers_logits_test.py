"""Checkpoints of the trainers, with their logits: `tools/check_trainers.py --keep` wrote them."""

import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmerge.checkpoints import trainers
from jaxmerge.checkpoints.survey import find
from jaxmerge.models.decoder import decoder

WRITTEN = Path(__file__).with_name("trainers_wrote")

# Both compute in float32, in orders of their own; see `tools/check_trainers.py`.
TOLERANCE = 2e-5


@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
@pytest.mark.parametrize("file", sorted(WRITTEN.glob("*.zip")), ids=lambda file: file.stem)
def test_logits_are_the_trainers(tmp_path, file):
    """The decoder with the trainer's own bytes, names and values."""
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path)
    (source,) = find([str(tmp_path / "checkpoint")], base=str(tmp_path))
    assert source.format == file.stem.split("-")[0].split("_")[0]
    params = trainers.restore(source, source.abstract)
    apply = jax.jit(decoder(source.view.known.config).apply)
    expected = np.load(tmp_path / "logits.npy")
    assert expected.std() > 0.1  # there is something to be equal to
    found = apply(params, np.load(tmp_path / "tokens.npy"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
