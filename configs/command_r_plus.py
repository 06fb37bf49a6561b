"""Sixteen checkpoints of the size of Command R+ on a TPU slice: the scale of arXiv 2412.04144.

    pip install '.[plan]'
    python -m jaxmerge.plan --config=configs/command_r_plus.py --topology=v5p:4x4x4

To be planned, not run: the paths are made up, and nothing of this size has been run yet. The shapes
are described by pool.model_args, so that the plan opens no checkpoint; the tokenizer is not there
either, so a byte is counted as a token, which is too many.
"""

from jaxmerge.config import Config, default

LAYERS = 64


def get_config() -> Config:
    config = default()
    config.pool.checkpoints = tuple(f"gs://bucket/command-r-plus/{k:02}" for k in range(16))
    config.pool.base = "gs://bucket/command-r-plus/base"
    config.pool.dtype = "bfloat16"
    config.pool.residency = "device"
    config.pool.model = "decoder"
    config.pool.model_args = {
        "vocab": 256_000,
        "width": 12_288,
        "layers": LAYERS,
        "heads": 96,
        "kv_heads": 8,
        "head_width": 128,
        "feed_forward": 33_792,
        "attention": ({"window": 0, "rope": {"theta": 75e6, "interleaved": True}},),
        "block": "parallel",
        "norm": "layer",
        "norm_epsilon": 1e-5,
        "query_key_norm": "heads",
        "logit_scale": 0.8333,
    }
    config.mesh.pop = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 8
    config.evaluate.candidates_per_step = 1  # one model takes all chips
    config.objective.tasks = ("arithmetic", "instructions", "programs")
    config.heldout = ("sorting", "counting")
    config.search.strategy = "CMA_ES"  # as in the paper
    config.search.budget = 400
    return config
