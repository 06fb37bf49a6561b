"""Eight small models, three tasks, one better model: the method of arXiv 2412.04144 in miniature.

python tools/make_pool.py --out=pools/quickstart
python -m jaxmerge.run --config=configs/quickstart.py --workdir=runs/quickstart
"""

import ml_collections

from jaxmerge.config import default


def get_config() -> ml_collections.ConfigDict:
    config = default()
    config.pool.checkpoints = ("pools/quickstart/*",)
    config.mesh.cpu_devices = 2  # two candidates at a time, a core each
    config.objective.tasks = ("arithmetic", "instructions", "programs")
    config.heldout = ("sorting", "counting")
    config.search.budget = 120
    return config
