"""x"""

from jaxmerge.config import Config, default


def get_config() -> Config:
    config = default()
    config.pool.base = "pools/smollm2-instruct"
    config.pool.checkpoints = ("pools/smollm2/*",)
    config.pool.dtype = "float32"
    config.pool.chat = True
    config.pool.system = "Give only the answer."
    gym = {"builder": "jaxmerge.tasks.reasoning_gym:reasoning_gym", "max_new_tokens": 12}
    config.tasks = {
        "sums": {**gym, "dataset": "chain_sum", "max_terms": 2, "max_digits": 2},
        "equations": {**gym, "dataset": "simple_equations", "max_terms": 2, "max_value": 20},
        "backward": {**gym, "dataset": "spell_backward", "max_word_len": 4},
        "letters": {**gym, "dataset": "letter_counting", "min_words": 1, "max_words": 2},
        "divisor": {**gym, "dataset": "gcd", "max_value": 60},
        "sequence": {**gym, "dataset": "number_sequence", "max_terms": 5, "max_complexity": 1},
        "reorder": {**gym, "dataset": "sentence_reordering", "max_words_in_sentence": 5},
        "family": {
            **gym,
            "dataset": "family_relationships",
            "min_family_size": 3,
            "max_family_size": 4,
        },
        "weekday": {**gym, "dataset": "calendar_arithmetic", "tasks": ("weekday_of_date",)},
        "needle": {
            **gym,
            "dataset": "needle_haystack",
            "min_num_statements": 2,
            "max_num_statements": 3,
        },
        "basic": {**gym, "dataset": "basic_arithmetic", "max_terms": 2, "max_digits": 2},
        "syllogism": {**gym, "dataset": "syllogism"},
        "bits": {**gym, "dataset": "count_bits", "max_n": 1023},
        "fraction": {
            **gym,
            "dataset": "fraction_simplification",
            "styles": ("plain",),
            "max_value": 12,
            "min_factor": 2,
            "max_factor": 9,
        },
        "product": {**gym, "dataset": "products", "max_digits": 2},
    }
    return config
