"""`python -m tubelet` is `tubelet`: where both begin."""

from __future__ import annotations

import os
import signal
from typing import NoReturn


def main() -> NoReturn:
    """The command line. Ctrl-C is answered from the first moment on, while its modules are still being loaded."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # who starts it in the background may have it ignored
        signal.signal(signal.SIGINT, _stop)
    from tubelet.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


def _stop(number: int, frame: object) -> NoReturn:
    """An exception would come up inside somebody's import; nothing has begun that would have to be put away."""
    os.write(2, b"tubelet: stopped\n")
    os._exit(130)


if __name__ == "__main__":
    main()
