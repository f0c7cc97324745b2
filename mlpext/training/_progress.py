"""The progress bar of a run, on stderr where that is a terminal."""

from __future__ import annotations

from tqdm import tqdm

from mlpext.training.history import Epoch


def bar_of(samples: int, done: int = 0) -> tqdm:
    """A bar over so many samples, shown on a terminal alone."""
    return tqdm(
        total=samples,
        initial=done,
        unit=" samples",
        unit_scale=True,
        dynamic_ncols=True,
        disable=None,  # tqdm's word for "unless stderr is a terminal"
    )


class Progress:
    """A bar over the samples of all epochs with loss and metrics; tqdm adds the samples per second.

    `show` may be a bar over several runs, of which this one takes its part.
    """

    def __init__(self, show: bool | tqdm, samples: int, epochs: int, done: int) -> None:
        self._samples = samples
        self._total = epochs * samples
        self._metrics: dict[str, float] = {}
        self._shared = not isinstance(show, bool)
        self._bar: tqdm | None = None
        self._first = 0  # where this run begins on the bar
        if not isinstance(show, bool):
            self._bar, self._first = show, show.n
            show.update(done * samples)
        elif show:
            self._bar = bar_of(self._total, done * samples)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is None:
            return
        if self._shared:
            self._advance_to(self._total)  # a run that ended early leaves nothing to wait for
        else:
            self._bar.close()

    def on_progress(self, samples: int, error: float) -> None:
        """So many samples more are done, and this is the mean of E over them."""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix({"loss": error, **self._metrics}, refresh=False)
            self._bar.update(samples)

    def end(self, epoch: Epoch) -> None:
        """An epoch is over, and with it the samples of which nothing was told."""
        self._metrics = epoch.metrics
        if self._bar is not None:
            self.on_progress(0, epoch.loss)
            self._advance_to(epoch.epoch * self._samples)
            if not self._shared:
                self._bar.set_description(f"epoch {epoch.epoch}", refresh=False)

    def _advance_to(self, samples: int) -> None:
        assert self._bar is not None
        self._bar.update(self._first + samples - self._bar.n)
