"""x"""

from jaxmerge.config import Config, default

GYM = {"builder": "reasoning_gym"}
TASKS = {
    "sums": {**GYM, "dataset": "chain_sum", "max_terms": 2, "max_digits": 2, "max_new_tokens": 8},
    "letters": {
        **GYM,
        **{"dataset": "letter_counting", "min_words": 1, "max_words": 2, "max_new_tokens": 8},
    },
    "sequence": {
        **GYM,
        **{"dataset": "number_sequence", "max_terms": 5, "max_complexity": 1, "max_new_tokens": 8},
    },
    "reorder": {
        **GYM,
        **{"dataset": "sentence_reordering", "max_words_in_sentence": 5, "max_new_tokens": 16},
    },
    "equations": {
        **GYM,
        **{"dataset": "simple_equations", "max_terms": 2, "max_value": 20, "max_new_tokens": 8},
    },
}


def get_config() -> Config:
    config = default()
    config.pool.checkpoints = ("pools/smollm2/*",)
    config.pool.base = "pools/smollm2-instruct"
    config.pool.dtype = "float32"
    config.pool.chat = True
    config.pool.system = "Give only the answer."
    config.mesh.cpu_devices = 2
    config.tasks = TASKS
    config.objective.tasks = ("sums", "sequence", "reorder")
    config.heldout = ("letters", "equations")
    config.objective.search_examples = 64
    config.objective.test_examples = 128
    config.evaluate.batch_size = 64
    config.baselines = ("uniform", "best-per-task", "greedy")
    # From the average of the best checkpoint per task, by their scores on the search split.
    config.search.init = (-2, -1, 0, 2, 2, 0, 2, -1)
    config.search.sigma = 0.7
    config.search.budget = 40
    return config
