"""Works off cases, in a process that may die of one without losing the others."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..measuring.rows import describe_run
from .cases import Case, Machine, NotHere, Options
from .results import BEGUN, CUT_OFF, FAILED, NOT_HERE, PASSED, Results

GRACE = 4
"""A case may take so many times what it is expected to take, and a minute, before its process is ended."""
BROKEN = 3
"""The exit code of a process whose GPU answers no more."""
START_METHOD = "spawn"
"""Of processes: what is forked cannot use CUDA."""


def supervise(options: Options, work: Callable[[Options, float, Iterable[str]], None]) -> Results:
    """Run all cases for which there is time.

    A GPU that has met an error answers nothing more in the process that met it, and a crash ends it. Then the case
    that ran has failed, and a new process goes on with the others.

    Args:
        options (`Options`): What the command line says.
        work (`Callable`): Runs cases until the time that it is given, in a process of its own.
    """
    deadline = time.time() + 60 * options.minutes
    tried: set[str] = set()
    while time.time() < deadline:
        process = multiprocessing.get_context(START_METHOD).Process(target=work, args=(options, deadline, tried))
        process.start()
        process.join(max(0.0, deadline - time.time()) + 60)
        if process.is_alive():  # not even its watchdog got through
            process.kill()
            process.join()
        if process.exitcode == 0:
            break
        results = Results(options.folder)
        for case in results.begun:
            status = CUT_OFF if time.time() > deadline else FAILED
            results.add(case, status, error=f"The process ended with {process.exitcode}; its output says more.")
        news = {name for name, result in results.by_case.items() if result["status"] == FAILED} - tried
        if not news and time.time() < deadline:
            raise RuntimeError(f"The process that runs the cases ends with {process.exitcode}; its output says more.")
        tried |= news
    return Results(options.folder)


def run(cases: Iterable[Case], machine: Machine, tried: Iterable[str] = ()) -> Results:
    """Run cases one after the other, in this process.

    Args:
        cases (`Iterable[Case]`): What to run, but for what is in the file already.
        machine (`Machine`): Where.
        tried (`Iterable[str]`): Cases that another process has failed on in this run.
    """
    results = Results(machine.options.folder)
    for case in cases:
        if results.has_passed(case.name) or case.name in tried:
            continue
        if machine.seconds_left < case.seconds and not machine.toy:
            print(f"{case.name}: no time left", flush=True)
            continue
        results.add(case.name, BEGUN)
        result = run_one(case, machine)
        broken = result["status"] != PASSED and not answers(machine.device)
        if broken:  # whatever the case makes of its error, it is not to be tried again
            result["status"] = FAILED
        results.add(case.name, **result)
        said = result.get("error") or result["facts"] or f"{len(result['rows'])} rows"
        print(f"{case.name}: {result['status']}, {result['seconds']:.1f} s: {said}", flush=True)
        if broken:
            raise SystemExit(BROKEN)
    return results


def run_one(case: Case, machine: Machine) -> dict[str, Any]:
    """Run a case; returns what becomes of it."""
    start = time.time()
    limit = 60 + GRACE * case.seconds
    faulthandler.dump_traceback_later(max(1.0, min(limit, machine.seconds_left + 30)), exit=True)
    found: dict[str, Any] = {"rows": [], "facts": {}}
    try:
        outcome = case.run(machine)
        found["facts" if isinstance(outcome, dict) else "rows"] = outcome
        status = PASSED
    except NotHere as error:
        status, found["error"] = NOT_HERE, str(error)
    except TimeoutError as error:
        status, found["error"] = CUT_OFF, str(error)
    except Exception:  # whatever it is, the others go on
        status, found["error"] = FAILED, traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
        clean_up(machine.device)
    described = describe_run(machine.device, str(machine.setup.dtype).removeprefix("torch."), "gpu", [])
    return {"status": status, "seconds": time.time() - start, **found, **described}


def clean_up(device: torch.device) -> None:
    """Nothing of a case is left for the next one."""
    if "torch._dynamo" in sys.modules:  # which takes seconds to import
        torch._dynamo.reset()
    if device.type == "cuda" and answers(device):
        gc.collect()
        torch.cuda.empty_cache()


def answers(device: torch.device) -> bool:
    """Whether the device still computes."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False
