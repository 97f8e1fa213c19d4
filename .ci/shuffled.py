"""Run the tests of this folder in random order, in several processes at once.

What fails here and not in file order depends on a test that ran before it, or on something that
another process holds. --seed runs one order again, in one process. A process that takes too long
says where each of its threads is, and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import random
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator

TIME_LIMIT = 240  # seconds


def flatten(tests: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in tests:
        if isinstance(test, unittest.TestSuite):
            yield from flatten(test)
        else:
            yield test


def run_shuffled(seed: int) -> bool:
    """Run every test in the order of this seed; True if there are some and all passed."""
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    # Sorted first: a seed means the same order whatever order the loader found them in.
    tests = sorted(flatten(unittest.defaultTestLoader.discover(".")), key=lambda test: test.id())
    random.Random(seed).shuffle(tests)
    print(f"seed {seed}, {len(tests)} tests", flush=True)
    result = unittest.TextTestRunner(stream=sys.stdout).run(unittest.TestSuite(tests))
    return result.wasSuccessful() and result.testsRun > 0


def run_at_once(processes: int) -> bool:
    """Run that many processes, each with a seed of its own; print each one's output whole."""
    command = [sys.executable, "-X", "dev", "-W", "error", __file__, "--seed"]
    runs = []
    with contextlib.ExitStack() as stack:
        for _ in range(processes):
            seed = str(random.SystemRandom().randrange(10**6))
            # Files, not pipes: a pipe that is full would stop the tests.
            output = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                [*command, seed],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            runs.append((seed, output, process))
        failed = [seed for seed, _, process in runs if process.wait() != 0]
        for _, output, _ in runs:
            output.seek(0)
            print(output.read().decode(errors="backslashreplace"))
    for seed in failed:
        print(f"failed; to run it again: {' '.join(command)} {seed}")
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=8, help="how many at once (default 8)")
    parser.add_argument("--seed", type=int, help="run this order only, in this process")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return 0 if run_shuffled(arguments.seed) else 1
    return 0 if run_at_once(arguments.processes) else 1


if __name__ == "__main__":
    sys.exit(main())
