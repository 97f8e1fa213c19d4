"""Packaging: the one module and its types; to copy the module will do as well."""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent


def read_version() -> str:
    """Return the version that the module gives itself, without importing it."""
    source = (HERE / "feedtestserver.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('feedtestserver.py has no line __version__ = "..."')
    return match.group(1)


class BuildWithTypes(build_py):
    """Build the module and, as its stub package, a copy of it.

    Type checkers ignore the annotations of an installed module that has neither a stub nor a
    py.typed file, and only packages can have the latter (PEP 561).
    """

    def find_modules(self) -> list[tuple[str, str, str]]:
        source = "feedtestserver.py"
        return [("", "feedtestserver", source), ("feedtestserver-stubs", "__init__", source)]

    def get_module_outfile(self, build_dir: str, package: list[str], module: str) -> str:
        suffix = ".pyi" if module == "__init__" else ".py"
        return os.path.join(build_dir, *package, module + suffix)


class SdistWithTests(sdist):
    """The source distribution with the tests and their fixtures: where it is, they run."""

    def make_distribution(self) -> None:
        # Not in add_defaults(): setuptools calls that one on a command of its own, never here.
        leftovers = "global-exclude *~ *.py[co] .DS_Store"
        for line in ("include test_feedtestserver.py", "graft data", leftovers):
            self.filelist.process_template_line(line)
        super().make_distribution()


setup(
    name="feedtestserver",
    version=read_version(),
    description="A real HTTP server for the tests of feed readers and other HTTP clients",
    long_description=(HERE / "README.rst").read_text(encoding="utf-8"),
    long_description_content_type="text/x-rst",
    license="0BSD",
    py_modules=["feedtestserver"],
    python_requires=">=3.9",
    keywords=["http", "https", "server", "testing", "unittest", "feed", "rss", "atom"],
    classifiers=[
        "Intended Audience :: Developers",
        "Operating System :: Microsoft :: Windows",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Programming Language :: Python :: 3.15",
        "Programming Language :: Python :: Free Threading",
        "Programming Language :: Python :: Implementation :: CPython",
        "Programming Language :: Python :: Implementation :: PyPy",
        "Topic :: Internet :: WWW/HTTP :: HTTP Servers",
        "Topic :: Software Development :: Testing",
        "Topic :: Text Processing :: Markup :: XML",
        "Typing :: Typed",
    ],
    cmdclass={"build_py": BuildWithTypes, "sdist": SdistWithTests},
)
