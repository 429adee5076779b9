"""How far a run is: one bar in a terminal, lines elsewhere (SLURM, nohup, CI)."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from hdpo.errors import check_at_least, check_positive
from hdpo.experience import Experience


def duration(seconds: float) -> str:
    """A duration to two figures that a person reads.

    Example:
        >>> [duration(s) for s in (0.314, 9.96, 75, 7_260, 200_000)]
        ['0.31 s', '10 s', '1 min 15 s', '2 h 1 min', '2 d 8 h']
    """
    if seconds < 59.5:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        whole = round(seconds / smaller) * smaller
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    raise AssertionError(seconds)


def describe(step: int, total: int, metrics: Mapping[str, float], seconds: float, left: float | None) -> str:
    """One line on a training run.

    Args:
        step: steps that are done.
        total: steps of the run; -1 where only time ends it.
        metrics: name -> value, in this order.
        seconds: per step.
        left: seconds until the run ends; None where nobody knows.

    Example:
        >>> describe(3, 60, {"reward": 0.4141, "cliffs": 0.25}, 2.5, 143)
        'step 3/60 | reward 0.414 | cliffs 0.250 | 2.5 s per step | 2 min 23 s left'
    """
    parts = [f"step {step}" if total < 0 else f"step {step}/{total}"]
    parts += [f"{name} {value:.3f}" for name, value in metrics.items()]
    parts.append(f"{duration(seconds)} per step")
    return " | ".join(parts if left is None else [*parts, f"{duration(left)} left"])


class Progress(ProgressBar):
    """Shows step, reward, cliffs, pass@k, seconds per step and the time that is left, on standard error.

    In a terminal as one bar, elsewhere as lines. What ``self.log(..., prog_bar=True)`` logs is shown too. The time that
    is left counts the evaluations to come, each as long as the last one. ``trainer.enable_progress_bar: false``, or a
    progress bar in ``trainer.callbacks``, takes this one away.

    Args:
        every_n_steps: without a terminal, steps between two lines; the first and the last step get a line too.
        every_n_seconds: without a terminal, seconds after which a line comes anyway; in evaluations the interval.

    Raises:
        ConfigError: a value outside its range.
    """

    def __init__(self, every_n_steps: int = 10, every_n_seconds: float = 60.0) -> None:
        super().__init__()
        check_at_least(1, progress__every_n_steps=every_n_steps)
        check_positive(progress__every_n_seconds=every_n_seconds)
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self._enabled = True
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._evaluation_seconds = 0.0
        self._began = self._told = 0.0
        self._batches = 0

    def disable(self) -> None:
        """Show nothing; Lightning asks for it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show something again."""
        self._enabled = True

    # ------------------------------------------------------------------ bars and lines

    def _show(self, name: str, text: str, done: int, total: float | None) -> bool:
        """Set a bar, and say whether there are bars at all: without a terminal lines have to be printed."""
        if not self._enabled:
            return True
        if self._bars is None:
            console = Console(stderr=True)
            if not console.is_terminal:
                return False
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
            self._bars = Bars(*columns, console=console, transient=True, refresh_per_second=4)
            self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(text, total=total)
        self._bars.update(self._tasks[name], description=text, completed=done, total=total)
        return True

    def _hide(self, name: str) -> None:
        if self._bars is not None and name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._tasks = None, {}

    def _print_line(self, text: str) -> None:
        self._told = time.monotonic()
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)  # above the bars
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print what ``trainer.print`` is given."""
        self._print_line(sep.join(map(str, args)))

    # ------------------------------------------------------------------ training

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the times of another fit."""
        self._step_seconds.clear()
        self._told = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Experience, batch_idx: int) -> None:
        """Show the step."""
        step, total = trainer.global_step, trainer.max_steps
        self._step_seconds.append(batch.metrics["time/step"])
        seconds = sum(self._step_seconds) / len(self._step_seconds)
        evaluations = self._evaluations_left(trainer) * self._evaluation_seconds
        left = None if total < 0 else (total - step) * seconds + evaluations
        metrics = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
        text = describe(step, total, metrics, seconds, left)
        is_due = step % self.every_n_steps == 0 or time.monotonic() - self._told >= self.every_n_seconds
        first_or_last = len(self._step_seconds) == 1 or step == total
        if not self._show("fit", text, step, None if total < 0 else total) and (is_due or first_or_last):
            self._print_line(text)

    @staticmethod
    def _evaluations_left(trainer: Any) -> int:
        """How many evaluations come from this step's on, at the interval and after the last step."""
        interval = trainer.val_check_batch
        if interval in (None, float("inf")) or not trainer.enable_validation:
            return 0
        return int(-(-trainer.max_steps // interval) - (trainer.global_step - 1) // interval)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the bar away; the last evaluation has one of its own."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the terminal back."""
        self._stop()

    # ------------------------------------------------------------------ evaluation and prediction

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        self._began = self._told = time.monotonic()
        self._batches = 0

    def _count(self, trainer: Any) -> None:
        numbers = {"test": trainer.num_test_batches, "predict": trainer.num_predict_batches}
        stage = trainer.state.fn.value
        total = sum(numbers.get(stage, trainer.num_val_batches))
        self._batches += 1
        elapsed = time.monotonic() - self._began
        left = elapsed / self._batches * (total - self._batches)
        name = "predicting" if stage == "predict" else "evaluating"
        text = f"{name}: batch {self._batches}/{total} | {duration(elapsed)} | {duration(left)} left"
        shown = self._show("evaluation", text, self._batches, total)
        if not shown and self._batches < total and time.monotonic() - self._told >= self.every_n_seconds:
            self._print_line(text)

    def _finish(self, trainer: Any) -> None:
        self._evaluation_seconds = time.monotonic() - self._began
        self._hide("evaluation")
        if trainer.state.fn != "fit" or not self._tasks:
            self._stop()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the batch."""
        self._count(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Say what was found; outside ``fit`` a table does."""
        self._finish(trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            wanted = [name for name in trainer.callback_metrics if name.count("/") == 1 and "any@" not in name]
            values = {n: float(trainer.callback_metrics[n]) for n in wanted if n.startswith(("val/", "test/"))}
            found = " | ".join(f"{name.partition('/')[2]} {value:.3f}" for name, value in values.items())
            self._print_line(
                f"evaluation at step {trainer.global_step} | {found} | {duration(self._evaluation_seconds)}"
            )

    on_validation_start = on_test_start = on_predict_start = _begin
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the bar away."""
        self._finish(trainer)

    on_predict_end = on_test_end
