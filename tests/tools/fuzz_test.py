"""Every reader of files of others, on inputs that are spoiled in some way."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools import fuzz_readers, fuzz_spoil

# Of the readers that take more than a few milliseconds: the page, and what transformers reads.
SLOW = {"config", "tokenizer", "tokenizer_config", "generation_config", "results", "run_config"}
SLOW |= {"run_pool", "run_tasks", "run_outputs", "candidates_page", "adapter_config"}


@pytest.mark.filterwarnings("ignore:Possible nested set")  # in a regular expression
@pytest.mark.parametrize("name", fuzz_readers.READERS)
def test_any_input_is_read_or_refused(name, tmp_path):
    """One message of ours or a result: no other error, no hang, no heap of memory."""
    reader = fuzz_readers.READERS[name](tmp_path)
    reader.read(reader.seeds[0])

    @settings(
        max_examples=8 if name in SLOW else 60,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.randoms(use_true_random=False), st.sampled_from(reader.seeds))
    def spoiled(draw: random.Random, seed: bytes) -> None:
        data = fuzz_spoil.spoiled(draw, seed)
        assert fuzz_readers.verdict(reader.read, data) in ("read", "refused"), data

    spoiled()
