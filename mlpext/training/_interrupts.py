"""Ctrl-C during a run: the step under way is completed first, so that no weight update is cut in two.

Signals arrive in the main thread alone. A run in another thread, one of fit_many's, is told to stop by a list
that fit_many shares with it.
"""

from __future__ import annotations

# What `signal` wraps: its enums would make a run's three calls take 10 us.
import _signal as signal  # type: ignore[import-not-found]
import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any


class Interrupts:
    """Holds Ctrl-C back while an epoch is under way.

        with Interrupts() as interrupts, interrupts.defer_interrupt() as interrupted: ...

    Python's own handler is the only one replaced (or that of a fit whose callback this is), and only in the
    main thread. Elsewhere `stop` says whether to stop: it is then not empty.
    """

    def __init__(self, stop: Sequence[object] = ()) -> None:
        self._stop = stop
        self._before = signal.getsignal(signal.SIGINT)
        self._mine = threading.current_thread() is threading.main_thread() and (
            self._before is signal.default_int_handler
            or isinstance(getattr(self._before, "__self__", None), Interrupts)
        )
        self._pressed: list[int] | None = None

    def __enter__(self) -> Interrupts:
        if self._mine:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._mine and (now := signal.signal(signal.SIGINT, self._before)) != self._note:
            signal.signal(signal.SIGINT, now)  # somebody has replaced it meanwhile

    def _note(self, number: int, frame: Any) -> None:
        if self._pressed is None or self._pressed:  # between epochs, or the second time
            signal.default_int_handler(number, frame)
        else:
            self._pressed.append(number)

    @contextlib.contextmanager
    def defer_interrupt(self) -> Iterator[Sequence[object]]:
        """A sequence that is not empty once the run has to stop; it does so by KeyboardInterrupt, when the
        block ends."""
        self._pressed = []
        interrupted = self._pressed if self._mine else self._stop
        try:
            yield interrupted
        finally:
            self._pressed = None
        if interrupted:
            raise KeyboardInterrupt
