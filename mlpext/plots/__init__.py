"""Pictures of activations, networks, training runs and predictions; no display is needed.

Every function returns the matplotlib figure, which a notebook shows, and writes it to `path` if that is given
(.png, .svg or .pdf). Colours are Okabe and Ito's, which colour-blind readers tell apart too.
"""

from mlpext.plots._activations import plot_activations
from mlpext.plots._contours import plot_contour
from mlpext.plots._decisions import plot_decision_boundary
from mlpext.plots._histories import plot_histories, plot_learning_rates
from mlpext.plots._networks import plot_network
from mlpext.plots._predictions import plot_confusion_matrix, plot_labels, plot_predictions

__all__ = [
    "plot_activations",
    "plot_confusion_matrix",
    "plot_contour",
    "plot_decision_boundary",
    "plot_histories",
    "plot_labels",
    "plot_learning_rates",
    "plot_network",
    "plot_predictions",
]
