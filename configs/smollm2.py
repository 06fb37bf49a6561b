"""Eight fine-tunes of SmolLM2-135M-Instruct, three tasks of reasoning-gym: a real model, offline.

    bash tools/smollm2_pool.sh    # the model, six full fine-tunes and two LoRA adapters; see there
    python -m jaxmerge.run --config=configs/smollm2.py --workdir=runs/smollm2
    python tools/verify_export.py --config=configs/smollm2.py --workdir=runs/smollm2

On 2 CPU cores the pool took about 35 minutes, the search 81 beside a little other
work. The fine-tunes differ in mixture, rate, seed and method; none is good at more than one of the
three tasks:

    test scores, %              sums      sequence       reorder          mean
    --------------------------------------------------------------------------
    letters                      1.3           0.8           5.0           2.4  [1.9, 2.9]
    lora-letters                 1.6           0.8          52.1          18.1  [16.6, 19.7]
    lora-sums                   38.3          17.8           6.6          20.9  [18.8, 23.0]
    reorder-letters              1.3           2.3          77.3          27.0  [25.5, 28.4]
    sequence                     6.6          49.2           6.0          20.6  [18.7, 22.5]
    sequence-equations           2.6          33.6           5.3          13.8  [12.2, 15.5]
    sums                        56.9           4.7           6.7          22.8  [21.0, 24.5]
    sums-letters                29.5           5.9           6.4          13.9  [12.3, 15.6]
    uniform                     22.7          20.6           8.3          17.2  [15.2, 19.2]
    best-per-task               43.2          26.5          18.1          29.3  [26.9, 31.6]
    greedy                      43.2          26.5          18.1          29.3  [26.9, 31.6]
    search                      42.2          39.4          75.7          52.5  [49.9, 55.1]

    The searched merge against the best single checkpoint (reorder-letters): +25.5 points
    [+22.8, +28.1], p = 0.0001.
    Held out, letters: reorder-letters 78.4, uniform 77.6, search 0.2
      the search against reorder-letters -78.2 [-82.2, -74.0], uniform -77.4 [-81.5, -73.2]
    Held out, equations: reorder-letters 4.8, uniform 4.6, search 5.0
      the search against reorder-letters +0.2 [-1.9, +2.2], uniform +0.4 [-1.7, +2.5]

Above the average of the best per task it is by 23.2 points [+20.7, +25.7]; `letters`, which nobody
asked for, is gone. What was tried before stands in docs/smollm2.md. Draws and CMA-ES at equal
tokens were left out for time. The held-out tasks are held out of the search; some of the fine-tunes
were trained on them.
"""

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
    config.objective.search_examples = 256
    config.objective.test_examples = 384
    config.evaluate.batch_size = 64
    config.baselines = ("uniform", "best-per-task", "greedy")
    config.search.start = "best"  # as "auto" is; the uniform merge has nearly lost `reorder`
    config.search.steps = 80
    config.search.learning_rate = 0.2
    config.search.minibatch = 16
    config.search.score_every = 20
    config.analyses.leave_one_out = False  # eight more models on the test examples
    return config
