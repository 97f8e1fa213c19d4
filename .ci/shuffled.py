"""Run the tests of this folder in random order.

What fails here and not in file order depends on a test that ran before it. The seed is printed;
give it as the argument to have the same order again. A run that takes too long says where each of
its threads is, and ends.
"""

from __future__ import annotations

import faulthandler
import random
import sys
import unittest
from collections.abc import Iterator

TIME_LIMIT = 360  # seconds


def flatten(tests: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in tests:
        if isinstance(test, unittest.TestSuite):
            yield from flatten(test)
        else:
            yield test


def main() -> int:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.SystemRandom().randrange(10**6)
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    # Sorted first: a seed means the same order whatever order the loader found them in.
    tests = sorted(flatten(unittest.defaultTestLoader.discover(".")), key=lambda test: test.id())
    random.Random(seed).shuffle(tests)
    print(f"seed {seed}, {len(tests)} tests", flush=True)
    result = unittest.TextTestRunner(stream=sys.stdout).run(unittest.TestSuite(tests))
    return 0 if result.wasSuccessful() and result.testsRun else 1


if __name__ == "__main__":
    sys.exit(main())
