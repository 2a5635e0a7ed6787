"""Settings of a training run that takes seconds, on any of the tiny policies' scenes."""

SMALL = {
    "data": "scenes",
    "limit": 20,
    "max_steps": 4,
    "groups_per_step": 2,
    "num_generations": 3,
    "max_new_tokens": 24,
    "save_steps": 2,
    "eval_limit": 4,
    "lora_rank": 2,
    "learning_rate": 1e-3,
    "report_to": "none",
}
