"""Progress bars of others, fed by ``progress=``."""

import asyncio
import io
import re
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress
from tqdm import tqdm

from async_pipeline import Pipeline

pytestmark = pytest.mark.virtual


async def work(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return 1 / (seconds - 0.5)


ITEMS = [0.1, 0.2, 0.5, 0.7]
pipeline: Pipeline[float, float] = Pipeline([work])


async def test_tqdm() -> None:
    screen = io.StringIO()
    with tqdm(total=len(ITEMS), file=screen, mininterval=0, ascii=True) as bar:
        await pipeline.map(
            ITEMS, return_exceptions=True, progress=lambda done, failed, total: bar.update(done - bar.n)
        )
    assert bar.n == 4
    assert re.search(r"100%\|#+\| 4/4 ", screen.getvalue())
    assert "| 1/4 " in screen.getvalue()


async def test_tqdm_of_a_stream_whose_length_is_unknown() -> None:
    screen = io.StringIO()
    with tqdm(file=screen, mininterval=0) as bar:

        def progress(done: int, failed: int, total: int | None) -> None:
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(done - bar.n)

        async with pipeline.stream(iter(ITEMS), progress=progress) as results:
            async for _ in results.outcomes():
                pass
    assert re.search(r"4it \[.*failed=1\]", screen.getvalue())


async def test_rich() -> None:
    seen: list[Any] = []
    with Progress(console=Console(file=io.StringIO()), auto_refresh=False) as bars:
        task = bars.add_task("working", total=None)

        def progress(done: int, failed: int, total: int | None) -> None:
            bars.update(task, completed=done, total=total)
            seen.append((bars.tasks[0].completed, bars.tasks[0].total))

        await pipeline.map(ITEMS, return_exceptions=True, progress=progress)
        assert bars.finished
    assert seen[0] == (1, 4)
    assert seen[-1] == (4, 4)
