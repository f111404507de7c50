"""Base and tuned model on the same held-out rows: token-weighted loss, perplexity and accuracy, by row."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn

from job.data.prepared import Rows
from job.errors import InternalError
from job.evaluation.figures import OF_TOKENS, Array, figures
from job.training.device import Numbers, Placement
from job.training.head import Scores
from job.training.kernels import Kernel


class StopAsked(Exception):
    """The request to leave came in the middle of an evaluation."""


@dataclass(frozen=True)
class Figures:
    """What one model scores on the evaluation rows."""

    loss: float
    """Sum of the cross entropies (nats) of all trained tokens by their number, whatever the batches were."""
    perplexity: float
    """exp(loss)."""
    token_accuracy: float
    """Share of trained tokens that the model, given the right beginning, ranks first."""
    tokens: int
    """Trained tokens measured."""
    sums: Array = field(compare=False, repr=False)
    """Of each row, ``[rows, 3]``: loss, tokens ranked first, tokens."""


@torch.no_grad()
def measure(
    core: nn.Module,
    rows: Rows,
    kernel: Kernel,
    placement: Placement,
    budget: int,
    limit: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Figures:
    """Loss and accuracy on the first ``limit`` rows, in batches of up to ``budget`` tokens of similar length.

    Leaves the training untouched: no random number is drawn, and the mode is put back. The ranks share the batches,
    and each knows all figures in the end.

    Raises:
        StopAsked: ``should_stop`` said so on a rank, between two batches; all ranks raise at the same one.
    """
    request = _Request(should_stop, placement)
    count = len(rows) if limit is None else min(limit, len(rows))
    groups = by_length(rows.lengths[:count], budget, kernel.padded)
    sums = torch.zeros((count, 3), dtype=torch.float64, device=placement.device)
    with evaluating(core), kernel.installed(core):
        for group, counts in dealt(groups, placement):
            on_batch()
            if request.is_heard():
                raise StopAsked
            with placement.autocast():
                scores = kernel.score(core, kernel.collate(rows, group))
            if counts:
                _add(sums, rows, group, scores)
    whole = over_ranks(sums, placement)
    return Figures(**figures(whole, OF_TOKENS), tokens=int(whole[:, 2].sum()), sums=whole)


class _Request:
    """Whether a rank is asked to leave, as all ranks know it at the same batch.

    Several know of it a batch late: the device never waits for the host to hear of the batch under way.
    """

    def __init__(self, should_stop: Callable[[], bool] | None, placement: Placement) -> None:
        self._should_stop, self._placement = should_stop, placement
        self._told: Numbers | None = None

    def is_heard(self) -> bool:
        """Asked by every rank before each of its batches."""
        if self._should_stop is None:
            return False
        here = self._should_stop()
        if self._placement.world == 1:
            return here
        ranks = torch.full((1,), float(here), device=self._placement.device)
        dist.all_reduce(ranks)
        before, self._told = self._told, Numbers(ranks)
        return before is not None and before.read()[0] > 0


def over_ranks(sums: Tensor, placement: Placement) -> Array:
    """Sums of rows ``[rows, columns]``, each row of which one rank has filled, as every rank gets to know them."""
    if placement.world > 1:
        dist.all_reduce(sums)
    return sums.cpu().numpy()


def dealt(groups: Sequence[list[int]], placement: Placement) -> list[tuple[list[int], bool]]:
    """This rank's groups, each with whether it counts.

    Every rank gets as many, for a shared base is gathered by all of them together: whoever has fewer goes through one
    more that another rank has, for nothing.
    """
    mine = [(group, True) for group in groups[placement.rank :: placement.world]]
    passes = -(-len(groups) // placement.world)
    return mine + [(group, False) for group in [*groups[-1:]] * (passes - len(mine))]


def _add(sums: Tensor, rows: Rows, group: Sequence[int], scores: Scores) -> None:
    """Adds a batch's scores, which come row by row, to the sums of its rows."""
    counts = torch.from_numpy(rows.supervised[list(group)].astype("int64"))
    if int(counts.sum()) != len(scores.losses):
        raise InternalError(f"{len(scores.losses)} tokens were scored where the rows have {int(counts.sum())}")
    owners = torch.tensor(list(group)).repeat_interleave(counts).to(sums.device)
    values = torch.stack([scores.losses.double(), scores.right.double(), torch.ones_like(scores.losses).double()], 1)
    sums.index_add_(0, owners, values)


def by_length(lengths: npt.NDArray[np.int32], budget: int, padded: bool) -> list[list[int]]:
    """Rows in batches of similar length that cost at most ``budget`` tokens each, the longest first.

    Args:
        lengths: tokens of each row.
        budget: tokens a batch may cost; a row alone may exceed it.
        padded: a batch costs its longest row times its rows; otherwise the sum of its rows.
    """
    groups: list[list[int]] = []
    cost = budget + 1
    for row in np.argsort(-lengths, kind="stable"):
        length = int(lengths[row])
        grown = int(lengths[groups[-1][0]]) * (len(groups[-1]) + 1) if groups and padded else cost + length
        if not groups or grown > budget:
            groups.append([int(row)])
            cost = length
        else:
            groups[-1].append(int(row))
            cost = grown
    return groups


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout while the block runs."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def as_base(model: PeftModel, biases: dict[str, Tensor]) -> Iterator[None]:
    """The model as it was before training: adapter off, and trained biases (``lora.bias``) put back for the while."""
    parameters = dict(model.named_parameters())
    tuned = {name: parameters[name].detach().clone() for name in biases}
    _assign(parameters, biases)
    try:
        with model.disable_adapter():
            yield
    finally:
        _assign(parameters, tuned)


@torch.no_grad()
def _assign(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def trained_biases(model: PeftModel) -> dict[str, Tensor]:
    """Copies of the base's own bias vectors that will train; empty unless ``lora.bias`` asks for it."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.endswith(".bias") and "lora_" not in name and "modules_to_save" not in name
    }
