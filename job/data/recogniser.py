"""The shape of a file's rows: that of the first row with the columns of one."""

from dataclasses import replace

from job.data.formats import Shape, recognise
from job.data.messages import unread
from job.data.rows import BadRow, Row
from job.errors import DataInvalid
from job.spec_sections import Data


class Recogniser:
    """Asked with each row of one file until the shape is known; rows before that are bad ones."""

    def __init__(self, data: Data) -> None:
        self._data, self._named = data, data.columns.model_dump(exclude_none=True)
        self._unlike = 0

    def shape_of(self, row: Row) -> Shape | BadRow:
        """The shape of the rows from this one on, or what is wrong with this one.

        Raises:
            DataInvalid: more rows than ``data.max_bad_rows`` have the columns of no format.
            SpecInvalid: ``data.columns`` names parts that do not go together.
        """
        try:
            shape = recognise(row.values, self._data.format, self._named, row.origin)
        except DataInvalid:
            self._unlike += 1
            if self._unlike > self._data.max_bad_rows:
                raise
        else:
            column = shape.columns.get("messages", "")
            inside = tuple(f"{column}[].{key}" for key in unread(row.values.get(column)))
            return replace(shape, unused=shape.unused + inside)
        problem = f"unknown columns: no known format has those of this row ({len(row.values)}); see data.columns"
        return BadRow(row.source, row.number, "unknown columns", problem)
