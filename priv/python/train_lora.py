"""Trains an adapter with mlx_lm, for Bombus.Training.LoRA.

    python train_lora.py < settings    (a line of JSON; then the pipe stays open as long as the caller lives)

Events go to the standard output, a JSON object a line; whatever mlx_lm prints goes to the file `log`. Settings: those
of mlx_lm's lora command, `log`, and `done`, the iterations of an earlier run that `resume_adapter_file` holds: numbers
go on from there. Until the event `begun` nothing is written but the log, and nothing of an earlier adapter is touched
before there are weights to take its place.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import sys
import threading
import traceback
import types
from pathlib import Path

events = os.fdopen(os.dup(1), "w", buffering=1)
# Faults that an error shows, of however many.
SHOWN = 5
# Rows of which the loss is taken before and after.
COMPARED = 4


def emit(**event):
    events.write(json.dumps(event) + "\n")


def exit_with_the_caller():
    """The pipe closes when the caller dies, however it does."""
    os.read(0, 1)
    os._exit(3)


class NoNumber(Exception):
    pass


class BadData(Exception):
    pass


class BadOption(Exception):
    pass


class DiskFull(Exception):
    pass


class Plain:
    """A text stream without what colors and moves a terminal's cursor."""

    escape = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_])")

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        self.stream.write(self.escape.sub("", text))
        return len(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def log_to(path):
    """What is printed here and below goes to a file."""
    log = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = Plain(sys.stdout), Plain(sys.stderr)


def number(value):
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def finite(loss, iteration, learning_rate):
    if not math.isfinite(loss):
        raise NoNumber(
            f"the loss is {loss} at iteration {iteration}: lower :learning_rate, which is {learning_rate}"
        )


class Folder:
    """The adapter's folder. A file is written beside its place and moved there; the first brings the configuration."""

    def __init__(self, settings):
        self.path = Path(settings["adapter_path"])
        self.done = settings["done"]
        resumed = settings["resume_adapter_file"]
        self.goes_on = resumed is not None and Path(resumed).parent == self.path
        self.config = None

    def save_config(self, config, path):
        self.config = dict(config), Path(path)

    def save(self, write, path):
        """Checkpoints are numbered with the iterations of an earlier run."""
        if match := re.fullmatch(r"(\d{7})_adapters\.safetensors", path.name):
            path = path.with_name(f"{int(match[1]) + self.done:07d}_adapters.safetensors")
        with self.beside(write, path, "safetensors") as part:
            if self.config is not None:
                self.begin()
            part.replace(path)
        if match:
            emit(type="checkpoint", iteration=int(match[1]) + self.done, path=str(path))

    def begin(self):
        """An earlier adapter goes now: the weights that take its place are on the disk."""
        from mlx_lm.utils import save_config

        (config, path), self.config = self.config, None
        with self.beside(lambda part: save_config(config, part), path, "json") as part:
            part.replace(path)
        if not self.goes_on:
            for old in self.path.glob("*_adapters.safetensors"):
                if re.fullmatch(r"\d{7}_adapters\.safetensors", old.name):
                    old.unlink()
            (self.path / "adapter_model.safetensors").unlink(missing_ok=True)
        # Of a training that was killed.
        for part in self.path.glob(".*.part.*"):
            if f".{os.getpid()}.part." not in part.name:
                part.unlink()

    @contextlib.contextmanager
    def beside(self, write, path, suffix):
        # MLX would append the suffix where a name lacks it.
        part = path.with_name(f".{path.stem}.{os.getpid()}.part.{suffix}")
        try:
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            write(part)
            yield part
        except Exception as error:
            raise full(error, path) or error
        finally:
            part.unlink(missing_ok=True)


def full(error, path):
    """The error of a full disk, if that is what it was."""
    no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # MLX says only that it could not write.
    if no_room or re.search(r"No space left|[Uu]nable to write|[Ff]ailed to write", str(error)):
        free = shutil.disk_usage(path.parent).free
        return DiskFull(f"there is no room to write `{path}` ({free // 2**20} MiB are free on its disk)")


def text(content):
    """As mlx_lm's server has it: parts are joined, and null is empty."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return "" if content is None else content


def read(path):
    """Rows with the numbers of their lines; mlx_lm's own load_dataset fails on empty lines and files."""
    # Not splitlines, which takes more for the end of a line than JSON escapes.
    lines = path.read_text(encoding="utf-8-sig").split("\n") if path.exists() else []
    rows = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
    for _, row in rows:
        for message in row.get("messages") or []:
            message["content"] = text(message.get("content"))
    return rows


def fault(tokens, offset, longest):
    """Why nothing of a row's answer would be learned."""
    learned = min(len(tokens), longest - 1) - max(offset, 1)
    if learned >= 0:
        return None
    if len(tokens) > offset:
        return (
            f"its prompt has {offset} tokens, and with max_seq_length: {longest} nothing of the answer is left "
            f"(all of it has {len(tokens)}): raise it, or shorten the prompt"
        )
    return f"the chat template leaves no answer behind the prompt's {offset} tokens"


class Tokens:
    """What mlx_lm makes of rows, made once, before the training: `(token ids, where the answer begins)`."""

    def __init__(self, path, tokenizer, args):
        from mlx_lm.tuner.datasets import create_dataset

        rows = read(path)
        dataset = create_dataset([row for _, row in rows], tokenizer, args) if rows else None
        self.items, faults = [], []
        for line, row in rows:
            try:
                tokens, offset = dataset.process(row)
                wrong = fault(tokens, offset, args.max_seq_length)
            except Exception as error:
                wrong = f"the tokenizer or its chat template fails: {error or type(error).__name__}"
            else:
                self.items.append((tokens, offset))
            if wrong:
                faults.append(f"line {line}: {wrong}")
        if faults:
            more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
            raise BadData(f"`{path}`, {'; '.join(faults[:SHOWN])}{more}")
        self.cut = sum(len(tokens) > args.max_seq_length for tokens, _ in self.items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def process(self, item):
        return item


def loss_of(model, items, longest):
    """The loss of some rows, each alone: the same rows before and after a training can be compared."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.tuner.trainer import default_loss, iterate_batches

    state = np.random.get_state()
    losses, count = 0.0, 0
    model.eval()
    for batch, lengths in iterate_batches(items, 1, longest):
        loss, tokens = default_loss(model, batch, lengths)
        losses, count = losses + (loss * tokens).item(), count + tokens.item()
    np.random.set_state(state)
    mx.clear_cache()
    return losses / count


def judge(before, after, guess, learning_rate):
    """Says where an adapter makes things worse: nearly always too high a learning rate."""
    if after > grown(before):
        said = f"the loss of rows that were trained with has grown from {before:.2f} without the adapter to {after:.2f}"
    elif abs(after - guess) < 0.02:
        said = f"the loss of rows that were trained with is {after:.2f}, that of a guess: all tokens are as probable"
    else:
        return
    warn(f"{said}: lower :learning_rate, which is {learning_rate}")


def grown(loss):
    return 1.05 * loss + 0.05


def warn(message):
    emit(type="warning", message=message)


def train(settings):
    import mlx.core as mx
    import mlx_lm.lora
    import numpy as np
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.utils import load

    folder = Folder(settings)
    done = settings.pop("done")

    class Reports(TrainingCallback):
        validated = []

        def on_train_loss_report(self, info):
            finite(info["train_loss"], info["iteration"] + done, args.learning_rate)
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
            self.validated.append(info["val_loss"])

    args = types.SimpleNamespace(**{**mlx_lm.lora.CONFIG_DEFAULTS, **settings})
    np.random.seed(args.seed)
    model, tokenizer = load(args.model)
    rows, valid = (Tokens(Path(args.data) / name, tokenizer, args) for name in ("train.jsonl", "valid.jsonl"))
    if args.num_layers > len(model.layers):
        raise BadOption(f"the model has {len(model.layers)} layers, fewer than num_layers: {args.num_layers}")
    compared = rows.items[:COMPARED]
    before = loss_of(model, compared, args.max_seq_length)
    emit(type="begun")
    if rows.cut:
        warn(f"{rows.cut} of {len(rows)} rows are longer than max_seq_length: {args.max_seq_length}, and are cut off")
    if args.iters < args.grad_accumulation_steps:
        warn(
            f"{args.iters} iterations make no step with grad_accumulation: {args.grad_accumulation_steps}: "
            "the adapter stays as it began"
        )
    save = mx.save_safetensors

    def saved(path, weights, *rest, **options):
        if not all(mx.isfinite(weight).all().item() for weight in weights.values()):
            raise NoNumber(f"the loss is nan: lower :learning_rate, which is {args.learning_rate}")
        folder.save(lambda part: save(str(part), weights, *rest, **options), Path(path))

    mx.save_safetensors = saved
    mlx_lm.lora.save_config = folder.save_config
    reports = Reports()
    mlx_lm.lora.train_model(args, model, rows, valid, reports)
    after = loss_of(model, compared, args.max_seq_length)
    finite(after, args.iters + done, args.learning_rate)
    judge(before, after, math.log(model(mx.array([[0]])).shape[-1]), args.learning_rate)
    if reports.validated and reports.validated[-1] > grown(reports.validated[0]):
        first, last = reports.validated[0], reports.validated[-1]
        warn(f"the validation loss has grown from {first:.2f} to {last:.2f}: take a checkpoint of before")


def report(error):
    """To the caller first: the log may be on a full disk."""
    module = error.name if isinstance(error, ModuleNotFoundError) else None
    emit(type="error", kind=type(error).__name__, message=str(error), module=module)
    try:
        traceback.print_exception(error)
    except OSError:
        pass


def main():
    settings = json.loads(sys.stdin.buffer.raw.readline())
    threading.Thread(target=exit_with_the_caller, daemon=True).start()
    try:
        log_to(settings.pop("log"))
        train(settings)
        emit(type="done")
    except BaseException as error:
        report(full(error, Path(settings["adapter_path"]) / "training.log") or error)
        os._exit(1)


if __name__ == "__main__":
    main()
