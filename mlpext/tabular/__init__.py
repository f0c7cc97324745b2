"""Tables of columns of any type: read from a file, and turned into the numbers that a network takes.

`read_table` reads a file by pandas and names all its faults at once. `Columns` is the first step of a
scikit-learn pipeline: it gives each column the type that it had in training, and tells which are left out.
`preprocessing` are the steps from there to numbers, `target_of` says what the target means.
"""

from mlpext.tabular._columns import Columns, preprocessing
from mlpext.tabular._read import listed, read_table
from mlpext.tabular._targets import target_of

__all__ = ["Columns", "listed", "preprocessing", "read_table", "target_of"]
