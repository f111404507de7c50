"""Rows of .parquet files: of the columns that are wanted, a few at a time."""

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from job.data.row_error import RowError, reason, refuse
from job.inputs import Input

_BATCH_ROWS = 256
_BATCH_BYTES = 4 * 2**20
"""Bounds of what is held of a file: rows, and bytes by the mean of their row group."""
_BUFFER_BYTES = 2**20
"""Read of a column at a time; without it a whole row group would be."""


def read_parquet(
    source: Input, has_header: bool, columns: Collection[str] | None
) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Each row with its number. A column that is not wanted is null in every row, and not read.

    Raises:
        DataInvalid: the file cannot be read, or has two columns of a name.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source.path, buffer_size=_BUFFER_BYTES) as file:
            names = _names(source, file)
            wanted = [name for name in names if columns is None or name in columns]
            for group in range(file.num_row_groups):
                size = _batch_rows(file.metadata.row_group(group))
                for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=wanted):
                    for values in _values(batch):
                        number += 1
                        yield number, values if isinstance(values, RowError) else dict.fromkeys(names) | values
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        refuse(source, f"cannot be read as parquet after row {number}: {reason(error)}; write the file again")


def _names(source: Input, file: Any) -> list[str]:
    names: list[str] = file.schema_arrow.names
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        refuse(source, f"has two columns with the name {twice[0]!r}")
    return names


def _batch_rows(group: Any) -> int:
    """How many rows of a row group are read at once."""
    mean: int = group.total_byte_size // max(group.num_rows, 1)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(mean, 1)))


_UNREADABLE = (ValueError, OverflowError, KeyError)
"""What arrow raises for values that Python has no object for: times beyond the year 9999, zones nobody knows."""


def _values(batch: Any) -> Iterator[dict[str, Any] | RowError]:
    """The rows of a batch; one by one where some value cannot be had."""
    try:
        # A batch without columns still has its rows.
        rows = batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows
    except _UNREADABLE:
        rows = (_row(batch.slice(i, 1)) for i in range(batch.num_rows))
    for row in rows:
        yield row if isinstance(row, RowError) else {name: _without_nulls(value) for name, value in row.items()}


def _row(batch: Any) -> dict[str, Any] | RowError:
    values = {}
    for name in batch.schema.names:
        try:
            values[name] = batch.column(name)[0].as_py()
        except UnicodeDecodeError:
            return RowError("invalid UTF-8", f"in column {name!r}")
        except _UNREADABLE as error:
            return RowError("value out of range", f"in column {name!r}: {reason(error)}")
    return values


def _without_nulls(value: Any) -> Any:
    """A column's value without the members that are null.

    Arrow gives every object of a column the keys of all of them: nobody wrote those nulls.
    """
    if isinstance(value, dict):
        return {name: _without_nulls(member) for name, member in value.items() if member is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
