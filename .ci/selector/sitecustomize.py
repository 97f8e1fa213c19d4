"""For PYTHONPATH: let selectors.DefaultSelector be the one that $SELECTOR names."""

import os
import selectors

selectors.DefaultSelector = getattr(selectors, os.environ["SELECTOR"])
