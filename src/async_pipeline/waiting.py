"""Waiting for what must not be left alive."""

import asyncio
from typing import Any

__all__ = ["until_ended"]


async def until_ended(*futures: "asyncio.Future[Any]") -> None:
    """Wait until all have ended, whatever becomes of them; a cancellation meanwhile is raised then.

    Until then it can't be cancelled, in whatever turn of the event loop that is tried: anyio does so in each.
    """
    cancellation = None
    while waiting := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError as error:
            cancellation = error
    try:
        if cancellation is not None:
            raise cancellation
    finally:
        del cancellation  # its traceback holds this frame
