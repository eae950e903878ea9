"""Trains an adapter with mlx_lm, for Bombus.Training.LoRA.

    python train_lora.py < settings    (a line of JSON; then the pipe stays open as long as the caller lives)

Events go to the standard output, a JSON object a line; whatever mlx_lm prints goes to training.log in the adapter's
folder. Settings: those of mlx_lm's lora command, and `done`, the iterations of an earlier run that `resume_adapter_file`
holds: numbers go on from there.
"""

import json
import math
import os
import re
import sys
import threading
import traceback
import types
from pathlib import Path

events = os.fdopen(os.dup(1), "w", buffering=1)


def emit(**event):
    events.write(json.dumps(event) + "\n")


def exit_with_the_caller():
    """The pipe closes when the caller dies, however it does."""
    os.read(0, 1)
    os._exit(3)


class NoNumber(Exception):
    pass


def log_to(folder):
    """What is printed here and below goes to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "training.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)


def number(value):
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def save_in_one_go(mx, done):
    """A checkpoint is written beside its place and moved there; its number counts the earlier run's iterations."""
    save = mx.save_safetensors

    def saved(path, weights, *rest, **options):
        path = Path(path)
        if match := re.fullmatch(r"(\d{7})_adapters\.safetensors", path.name):
            path = path.with_name(f"{int(match[1]) + done:07d}_adapters.safetensors")
        # MLX would append what a name lacks.
        part = path.with_name(f".{path.stem}.part.safetensors")
        save(str(part), weights, *rest, **options)
        part.replace(path)
        if match:
            emit(type="checkpoint", iteration=int(match[1]) + done, path=str(path))

    mx.save_safetensors = saved


def train(settings):
    import mlx.core as mx
    import numpy as np
    from mlx_lm.lora import CONFIG_DEFAULTS, train_model
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import create_dataset
    from mlx_lm.utils import load

    done = settings.pop("done")

    def rows(name):
        """mlx_lm's own load_dataset fails on empty lines and files."""
        path = Path(args.data) / name
        # Not splitlines, which takes more for the end of a line than JSON escapes.
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        rows = [json.loads(line) for line in lines if line.strip()]
        return create_dataset(rows, tokenizer, args) if rows else []

    class Reports(TrainingCallback):
        def on_train_loss_report(self, info):
            if not math.isfinite(info["train_loss"]):
                raise NoNumber(f"the loss is {info['train_loss']} at iteration {info['iteration'] + done}")
            emit(
                type="train",
                iteration=info["iteration"] + done,
                loss=info["train_loss"],
                learning_rate=info["learning_rate"],
                iterations_per_second=number(info["iterations_per_second"]),
                tokens_per_second=number(info["tokens_per_second"]),
                trained_tokens=info["trained_tokens"],
                peak_memory=round(info["peak_memory"] * 1e9),
            )

        def on_val_loss_report(self, info):
            emit(
                type="validation",
                iteration=info["iteration"] + done,
                loss=number(info["val_loss"]),
                seconds=info["val_time"],
                peak_memory=mx.get_peak_memory(),
            )

    args = types.SimpleNamespace(**{**CONFIG_DEFAULTS, **settings})
    np.random.seed(args.seed)
    save_in_one_go(mx, done)
    model, tokenizer = load(args.model)
    train_model(args, model, rows("train.jsonl"), rows("valid.jsonl"), Reports())


def main():
    settings = json.loads(sys.stdin.buffer.raw.readline())
    threading.Thread(target=exit_with_the_caller, daemon=True).start()
    log_to(Path(settings["adapter_path"]))
    try:
        train(settings)
        emit(type="done")
    except BaseException as error:
        traceback.print_exc()
        module = error.name if isinstance(error, ModuleNotFoundError) else None
        emit(type="error", kind=type(error).__name__, message=str(error), module=module)
        os._exit(1)


if __name__ == "__main__":
    main()
