"""Many small training runs, several at a time, whose results are kept one by one.

A run is a plain value (a dictionary) that a function turns into results. What is in the results file
already is not done again, so an interrupted reproduction goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformerfam.errors import UserError
from transformerfam.files import append_line

Run = dict[str, Any]
Result = dict[str, Any]


def results_of(
    runs: Sequence[Run], work: Callable[[Run], Result], file: Path, *, workers: int
) -> Iterator[tuple[Run, Result, bool]]:
    """Each run with its result, in the order in which they end; and whether it was kept from before.

    Args:
        runs: values that JSON can hold, all different.
        work: makes a result of a run; a function of a module, since it may run in another process.
        file: where results are kept, JSON lines.
        workers: processes, of one thread each: small models gain nothing from more. With one the work
            is done in this process.
    """
    kept = read_results(file)
    missing = []
    for run in runs:
        if (result := kept.get(_key(run))) is not None:
            yield run, result, True
        else:
            missing.append(run)
    if not missing:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    workers = min(workers, len(missing))
    made = (
        ((r, work(r)) for r in missing) if workers == 1 else _in_processes(missing, work, workers)
    )
    for run, result in made:
        append_line(file, json.dumps({"run": run, "result": result}))
        yield run, result, False


def _in_processes(
    runs: Sequence[Run], work: Callable[[Run], Result], workers: int
) -> Iterator[tuple[Run, Result]]:
    """Runs and their results, in the order in which they end."""
    with processes(workers) as pool:
        futures = {pool.submit(work, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes of one thread each, which are ended when something goes wrong in this one."""
    pool = ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    with _one_thread_each(), pool:
        try:
            yield pool
        except BaseException:
            # Before the pool is shut down, which forgets its processes.
            started = list((getattr(pool, "_processes", None) or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.terminate()
            raise


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for more work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_results(file: Path) -> dict[str, Result]:
    """Key of a run -> its result.

    Raises:
        UserError: for a file that holds something else, or cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from None
    kept, lines = {}, text.splitlines()
    for line in lines:
        try:
            read = json.loads(line)
            kept[_key(read["run"])] = read["result"]
        except (ValueError, KeyError, TypeError):
            continue  # cut short when its writer was killed
    # The first line of all may be one that was cut short.
    if not kept and (len(lines) > 1 or text.endswith("\n")):
        raise UserError(f"{file} is no file of results; move it away to begin anew.")
    return kept


def _key(run: Run) -> str:
    return json.dumps(run, sort_keys=True)


class _one_thread_each:  # a context manager
    """Processes started meanwhile compute with one thread."""

    _NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._NAMES}
        os.environ.update(dict.fromkeys(self._NAMES, "1"))

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
