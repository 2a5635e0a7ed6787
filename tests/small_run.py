"""Settings of a training run that takes seconds, on the tiny policy's scenes."""

import json
from pathlib import Path

SMALL = {"data": "scenes", "limit": 20, "max_steps": 4, "groups_per_step": 2, "num_generations": 3, "save_steps": 2}
SMALL |= {"max_new_tokens": 24, "eval_limit": 4, "lora_rank": 2, "learning_rate": 1e-3, "report_to": "none"}


def run(folder, **settings) -> list[dict]:
    """Train in this process; the rows of metrics.jsonl without times."""
    import train_rl

    train_rl.main(train_rl.Config(**(SMALL | {"output_dir": str(folder)} | settings)))
    return rows_of(folder)


def rows_of(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The rows of a run, without times."""
    rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
