"""Does the package work on a GPU, and how fast is it there? One command, sized for eight minutes on one H100.

    python -m examples.benchmarks.gpu --out DIR
    python -m examples.benchmarks.gpu --out DIR --data_dir PHOTOS --model MODEL --minutes 60     # with accuracy
    python -m examples.benchmarks.gpu --out DIR --device cpu --toy       # a dry run, with tiny models
    python -m examples.benchmarks.gpu --out DIR --report                 # tables and plots of what is there

Nothing is downloaded: images are random, and so are the weights of the models. First come checks that everything
works, then numbers in order of worth, then, with `--data_dir` and `--model`, the accuracy suite. DIR/results.jsonl has
a line for each as soon as it is there. What fails is recorded, and the rest goes on. What has no time left is not
begun; the same command, given again, does what is missing or has failed. At the end, tables are in DIR/report.md and
plots beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # python examples/benchmarks/gpu.py finds the others, too

from examples.benchmarks.on_gpu.cases import Case, Machine, Options
from examples.benchmarks.on_gpu.plan import plan
from examples.benchmarks.on_gpu.report import write_report
from examples.benchmarks.on_gpu.results import FAILED, Results
from examples.benchmarks.on_gpu.runner import run, supervise


def work(options: Options, deadline: float, tried: Iterable[str]) -> None:
    """Run the cases that are asked for, in this process."""
    run(chosen(options), Machine(options, deadline), tried)


def chosen(options: Options) -> list[Case]:
    cases = plan(options.toy)
    return [case for case in cases if not options.only or case.name.startswith(options.only)]


def parse(command: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8, help="when to stop (default: 8)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--toy", action="store_true", help="tiny models: to try the command, not to measure")
    parser.add_argument(
        "--only", nargs="+", default=[], help="cases whose names begin so, such as works: (default: all)"
    )
    parser.add_argument("--data_dir", help="data sets of the accuracy suite, see compare.py")
    parser.add_argument("--model", help="backbone of the accuracy suite")
    parser.add_argument("--report", action="store_true", help="run nothing; write the report of what is there")
    return parser.parse_args(command)


def main(command: Sequence[str] | None = None) -> Results:
    """Run the cases, write the report, and return the results."""
    given = parse(sys.argv[1:] if command is None else command)
    options = Options(
        given.out, given.device, given.toy, given.minutes, tuple(given.only), given.data_dir, given.model
    )
    if not given.report:
        if not chosen(options):
            raise SystemExit(f"--only {' '.join(given.only)}: there is no such case.")
        supervise(options, work)
    results = Results(options.folder)
    print(write_report(results, [case.name for case in plan(options.toy)]))
    return results


if __name__ == "__main__":
    found = main()
    sys.exit(any(result["status"] == FAILED for result in found.by_case.values()))
