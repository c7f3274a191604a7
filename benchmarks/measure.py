"""Time of several functions side by side, and the peak memory of one."""

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Case = Callable[[], Any]

# What the peak is measured under. Blocks of 64 kB and more are mapped each on its own and unmapped when freed, so that
# resident memory is what is alive: glibc would otherwise raise the threshold up to 32 MB, keep freed blocks in its heap
# and hand them out again, hiding what the next call needs. MKL too would keep its buffers from the call before.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}


class Spread(NamedTuple):
    """Median, smallest and largest of the repeats."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def interleaved(
    cases: Mapping[str, Case], *, repeats: int, prepare: Case | None = None, least_seconds: float = 0.05
) -> dict[str, list[float]]:
    """Seconds per call of each case, once per repeat; the cases take turns, in the opposite order every other repeat.

    Side by side rather than one after another, as `torch.utils.benchmark` and pytest-benchmark time: a machine that is
    slow for a minute is then slow for all of them, and the ratios within one repeat hold.

    Args:
        repeats: how often each case is timed, after two calls that are not.
        prepare: called before each timed call, and not timed itself.
        least_seconds: a case is called as often as fills this time; once, where there is `prepare`.
    """
    prepared = prepare or (lambda: None)
    calls: dict[str, int] = {}
    for name, case in cases.items():
        for _ in range(2):
            prepared()
            last = _seconds(case, 1)
        calls[name] = 1 if prepare else max(1, round(least_seconds / last))
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats):
        for name in list(cases)[:: -1 if repeat % 2 else 1]:
            prepared()
            times[name].append(_seconds(cases[name], calls[name]))
    return times


def ratios(times: Mapping[str, list[float]], case: str, baseline: str) -> list[float]:
    """The time of `case` over that of `baseline`, repeat by repeat."""
    return [one / other for one, other in zip(times[case], times[baseline], strict=True)]


def peak_extra_memory(case: Case, prepare: Case | None = None) -> int:
    """Bytes by which the resident memory of this process rises at most above its state before a second call of `case`.

    The kernel's own high-water mark, reset before the call: nothing is sampled, and buffers of MKL or oneDNN count.
    Right within about 1 MB, in a process started by `in_fresh_process`. Linux only.
    """
    prepared = prepare or (lambda: None)
    # The first call loads libraries, starts threads and compiles: none of that is needed again in a training.
    prepared()
    case()
    prepared()
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")
    before = _status("VmRSS")
    case()
    return max(_status("VmHWM") - before, 0)


def peak_own_memory(case: Case) -> int:
    """`peak_extra_memory` without files that are mapped into memory, which the kernel takes back when it needs room.

    There is no mark of it: the highest of what is seen every 2 ms.
    """
    case()
    seen, over = [_status("RssAnon")], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            seen.append(_status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        case()
    finally:
        over.set()
        watcher.join()
    return max(seen) - seen[0]


def in_fresh_process(module: str, *arguments: str) -> int:
    """The number that `python -m module arguments` prints last, run under `MEMORY_ENVIRONMENT`."""
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, env=os.environ | MEMORY_ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    return int(run.stdout.split()[-1])


def _seconds(case: Case, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        case()
    return (time.perf_counter() - start) / calls


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
