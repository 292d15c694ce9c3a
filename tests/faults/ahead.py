"""Imported by a command under test: a clock that is an hour ahead of the others'."""

import time

_true = time.time
time.time = lambda: _true() + 3600
