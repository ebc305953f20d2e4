"""Programs in which nothing may be unpickled: the first name that a pickle looks up is said, and ends the process at once.

An audit hook cannot be taken away again, so they are processes of their own. An exception could be caught by what unpickles.
"""

from __future__ import annotations

import subprocess
import sys

HOOK = """
import os, sys

def heard(event, facts):
    if event == "pickle.find_class":
        os.write(1, f"unpickled {facts[0]}.{facts[1]}".encode())
        os._exit(1)

sys.addaudithook(heard)
"""
PROOF = """
import pickle
pickle.loads(pickle.dumps(os.getcwd))
"""
"""That the hook has heard everything to the end."""
LAST = "unpickled posix.getcwd"


def watched(code: str, *words: object) -> subprocess.Popen[str]:
    """Start a program with these words in `sys.argv[1:]`."""
    command = [sys.executable, "-c", HOOK + code + PROOF, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_quiet(process: subprocess.Popen[str]) -> None:
    """Wait for the end of a program: it came there, and nothing was unpickled on the way."""
    said, errors = process.communicate()
    assert said == LAST, said + errors
