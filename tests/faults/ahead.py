"""Imported by a command under test: set its clock one hour ahead of the others."""

import time

_true = time.time
time.time = lambda: _true() + 3600
