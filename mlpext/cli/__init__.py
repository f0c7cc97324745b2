"""The command line, `python -m mlpext` or `mlpext`: train networks on tables, predict, draw, say what is
here.

Exit codes: 0 done; 1 it could not be done, one line on stderr says why; 2 bad arguments; 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mlpext.cli._options import parse
from mlpext.training import MODES

__all__ = ["MODES", "main"]

# What some commands need, and the package itself does not.
EXTRA = ("pandas", "sklearn", "skops", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (sys.argv's if None), return its exit code. Raises SystemExit(2) for a bad one."""
    options = parse(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt as interrupt:
        print("; ".join(["mlpext: interrupted", *interrupt.args]), file=sys.stderr)
        return 130
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        return _fail(f"{error.filename}: {error.strerror}" if named else str(error))
    except ModuleNotFoundError as error:
        extra = (
            "; pip install 'mlpext[train]' brings it" if (error.name or "").partition(".")[0] in EXTRA else ""
        )
        return _fail(f"{error}{extra}")
    except (ValueError, TypeError, FloatingPointError, ImportError, RuntimeError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__)
    return 0


def _fail(message: str) -> int:
    print(f"mlpext: error: {' '.join(message.split())}", file=sys.stderr)
    return 1
