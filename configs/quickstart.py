"""Eight small models, three tasks, one better model: the method of arXiv 2412.04144 in miniature.

python tools/make_pool.py --out=pools/quickstart
python -m jaxmerge.run --config=configs/quickstart.py --workdir=runs/quickstart
"""

from jaxmerge.config import Config, default


def get_config() -> Config:
    config = default()
    config.pool.checkpoints = ("pools/quickstart/*",)
    config.mesh.cpu_devices = 2  # two candidates at a time, a core each
    config.objective.tasks = ("arithmetic", "instructions", "programs")
    config.heldout = ("sorting", "counting")
    config.objective.search_examples = 128
    config.objective.test_examples = 600
    return config
