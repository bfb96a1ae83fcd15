"""One line of progress on rank 0: rewritten in place on a terminal, else printed every 10 s."""

import sys
import time

_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("eval_bits_per_byte", "bits/byte {:.4f}"),
    ("learning_rate", "lr {:.2e}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
)


class Progress:
    """Progress of one stage.

    Args:
        start: the step from which the stage resumes; 0 in a new stage.
        seconds: minimum time between two lines if standard output is not a terminal.
    """

    def __init__(self, stage: str, start: int, max_steps: int, rank: int, seconds: float = 10.0):
        self.stage = stage
        self.start = start
        self.max_steps = max_steps
        self.quiet = rank != 0
        self.terminal = sys.stdout.isatty()
        self.seconds = seconds
        self.began = time.monotonic()
        self.last = 0.0

    def update(self, step: int, values: dict[str, float]) -> None:
        """Show the progress; evaluations and the last step are always shown."""
        now = time.monotonic()
        notable = "eval_loss" in values or step == self.max_steps
        if self.quiet or not (notable or self.terminal or now - self.last >= self.seconds):
            return
        self.last = now
        done = step - self.start
        left = (now - self.began) / done * (self.max_steps - step) if done else 0.0
        parts = [f"[{self.stage} {step}/{self.max_steps}]"]
        parts += [form.format(values[key]) for key, form in _SHOWN if key in values]
        parts += [f"{int(left) // 60}:{int(left) % 60:02d} left"] if left else []
        end = "\r" if self.terminal and not notable else "\n"
        print(f"{'  '.join(parts):<100}", end=end, flush=True)
