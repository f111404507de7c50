"""How the evaluation loss goes on the way: the best state, and when to stop. Pure; part of every checkpoint."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Course:
    """What the evaluations so far came to. Losses are nats per trained token."""

    step: int = 0
    """Step of the newest evaluation; 0 before the first."""
    loss: float | None = None
    """What it found; None if that was not finite."""
    best_step: int = 0
    best_loss: float | None = None
    """The lowest loss so far, the first of equal ones."""
    mark: float | None = None
    """The loss that the next one has to be lower than by the least improvement."""
    since: int = 0
    """Evaluations in a row that were not."""

    def note(self, step: int, loss: float, min_improvement: float = 0.0) -> bool:
        """Takes up an evaluation.

        Returns:
            Whether it is the best so far. A loss that is not finite never is.
        """
        self.step, self.loss = step, loss if math.isfinite(loss) else None
        if self.loss is not None and (self.mark is None or self.loss < self.mark - min_improvement):
            self.mark, self.since = self.loss, 0
        else:
            self.since += 1
        is_best = self.loss is not None and (self.best_loss is None or self.loss < self.best_loss)
        if is_best:
            self.best_step, self.best_loss = step, self.loss
        return is_best

    def is_over(self, patience: int | None) -> bool:
        """Whether ``patience`` evaluations in a row brought nothing; never without a patience."""
        return patience is not None and self.since >= patience

    def loss_at(self, step: int) -> float | None:
        """The evaluation loss of a step, if that was the newest one evaluated."""
        return self.loss if self.step == step else None

    def record(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return asdict(self)
