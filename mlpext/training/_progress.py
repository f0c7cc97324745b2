"""The progress bar of a run, on stderr where that is a terminal."""

from __future__ import annotations

from tqdm import tqdm

from mlpext.training.history import Epoch


class Progress:
    """A bar over the samples of all epochs with loss and metrics; tqdm adds the samples per second."""

    def __init__(self, show: bool, samples: int, epochs: int, done: int) -> None:
        self._samples = samples
        self._metrics: dict[str, float] = {}
        self._bar = None
        if show:
            self._bar = tqdm(
                total=epochs * samples,
                initial=done * samples,
                unit=" samples",
                unit_scale=True,
                dynamic_ncols=True,
                disable=None,  # tqdm's word for "unless stderr is a terminal"
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
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
            self.on_progress(epoch.epoch * self._samples - self._bar.n, epoch.loss)
            self._bar.set_description(f"epoch {epoch.epoch}", refresh=False)
