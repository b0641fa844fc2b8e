"""The frame of what is closed at the end of a `with` block."""

from types import TracebackType
from typing import Self


class Closing:
    """Closed also if the block ends by an exception."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError
