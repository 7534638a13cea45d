"""Several processes, on several devices or machines, that share one analysis: who measures what, and how it comes
together.

Started by `accelerate launch` or torchrun, with Accelerate in between; alone, everything here does nothing. Each
process measures its layers and keeps every cell at once, so that a death costs only what was being measured; the first
process alone speaks and writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from llm_merge.analysis import iter_contributions
from llm_merge.contributions import Cell, Values, cells_of
from llm_merge.errors import MergeError

if TYPE_CHECKING:
    from llm_merge.analysis import Analysis, AnalysisEvent
    from llm_merge.contribution_report import ContributionReport

Result = TypeVar("Result")
PATIENCE = timedelta(days=2)
"""How long a process waits for the slowest one. A process that dies ends all of them much sooner: the launcher does."""


@dataclass(frozen=True)
class Share:
    """This process among those that work together: its number, how many there are, and its device.

    keeper      the first process on its machine
    """

    rank: int
    world: int
    device: str
    keeper: bool = True


def process_number() -> int:
    """This process's number among those that were started together, 0 for the first or only one."""
    return _number("RANK") if _number("WORLD_SIZE") > 1 else 0


def only_one_process(command: str) -> None:
    """Raises MergeError where several processes were started for a command that cannot share its work."""
    if _number("WORLD_SIZE") > 1:
        raise MergeError(f"{command} runs in one process: start it without accelerate or torchrun.", field="processes")


def join(device: str) -> Share:
    """Meet the other processes, if there are any. device: "auto", "cpu" or "cuda", and alone any other one.

    Raises MergeError where this process can have no device of its own.
    """
    if _number("WORLD_SIZE") <= 1:
        return Share(0, 1, device)
    import torch
    from accelerate import PartialState

    if device not in ("auto", "cpu", "cuda"):
        raise MergeError(f"Several processes share no `{device}`: use auto, cpu or cuda.", field="device")
    local, gpus = _number("LOCAL_RANK"), torch.cuda.device_count()
    on_cpu = device == "cpu" or (device == "auto" and not gpus)
    if not on_cpu and local >= gpus:
        raise MergeError(
            f"This machine has {gpus} GPU{'s' if gpus != 1 else ''} for {_number('LOCAL_WORLD_SIZE')} processes: start "
            "one process per GPU, or choose --device cpu.",
            field="device",
        )
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    return Share(state.process_index, state.num_processes, "cpu" if on_cpu else f"cuda:{local}", local == 0)


def leave(share: Share) -> None:
    if share.world > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def agree(share: Share, work: Callable[[], Result]) -> Result:
    """`work()`, in every process. What is wrong in any of them is wrong for all: the first one raises it as MergeError,
    so that it is said once. The others end with SystemExit and 0: a launcher that saw them fail would end the first one
    before it has spoken."""
    if share.world == 1:
        return work()
    results, problem = list[Result](), ""
    try:
        results.append(work())
    except MergeError as error:
        problem = error.message
    problems = gather(share, problem)
    if not any(problems):
        return results[0]
    if share.rank:
        raise SystemExit(0)
    numbers: dict[str, int] = {}
    for number, sentence in enumerate(problems):
        numbers.setdefault(sentence, number)
    said = [f"Process {number}: {sentence}" if number else sentence for sentence, number in numbers.items() if sentence]
    raise MergeError("\n".join(said))


def gather(share: Share, value: Result) -> list[Result]:
    """Every process's value, in order of the processes, in every process."""
    if share.world == 1:
        return [value]
    from accelerate.utils import gather_object

    found: list[Result] = gather_object([value])
    return found


def iter_shared(
    analysis: Analysis, share: Share, *, estimate: bool = True, layers: Sequence[str] | int | None = None
) -> Generator[AnalysisEvent, None, ContributionReport]:
    """`iter_contributions`, the exact part divided among the processes by layers; all get the whole report.

    Events tell of this process's part.
    """
    if share.world == 1:
        return in_order((yield from iter_contributions(analysis, estimate=estimate, layers=layers)))
    report = analysis.report()
    if estimate:
        # Made by all, since waiting would take as long; those of the first one count: all must agree on the order.
        report = yield from analysis.estimate(report)
        report = replace(report, estimates=gather(share, dict(report.estimates))[0])
    if layers is None or isinstance(layers, int):
        layers = report.doubtful()[:layers]
    mine = layers[share.rank :: share.world]
    if mine:
        report = yield from analysis.measure(report, mine)
    if layers:
        report = _brought_together(report, gather(share, (dict(report.whole), dict(report.cells))))
        if share.keeper:
            _keep(analysis, report.cells)
    return replace(in_order(report), seconds=time.monotonic() - analysis.started)


def in_order(report: ContributionReport) -> ContributionReport:
    """The report with its cells in order of tasks and layers, in whatever order they were measured."""
    keys = [layer.key for layer in report.setup.layers]
    return replace(report, cells={cell: report.cells[cell] for cell in cells_of(report.setup, keys)
                                  if cell in report.cells})  # fmt: skip


def _brought_together(
    report: ContributionReport, parts: Sequence[tuple[Mapping[tuple[str, str], Values], Mapping[Cell, Values]]]
) -> ContributionReport:
    cells = {cell: values for _, found in parts for cell, values in found.items()}
    return replace(report, whole=parts[0][0], cells=cells)


def _keep(analysis: Analysis, cells: Mapping[Cell, Values]) -> None:
    """What the other machines measured, on this one, too: a later analysis may divide the layers in another way."""
    scorer, setup = analysis.scorer, analysis.setup
    for cell, values in cells.items():
        key = scorer.key(setup.variant(cell), cell.task)
        if scorer.store.get(key) is None:
            scorer.store.put(key, values)


def _number(name: str) -> int:
    """A launcher's variable as a number, 0 where it is not set."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0
