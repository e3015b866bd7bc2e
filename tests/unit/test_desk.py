"""Where workers that stay wait for their next run."""

from __future__ import annotations

import asyncio

from service.training.desk import Desk


def test_every_worker_gets_each_job_and_the_driver_its_result_whoever_comes_first() -> None:
    async def a_day() -> tuple[list[bytes | None], bytes, bytes | None]:
        desk = Desk()
        early = [asyncio.create_task(desk.job(1)) for _ in range(2)]  # two workers, before there is a job
        awaited = asyncio.create_task(desk.result(1))
        await asyncio.sleep(0)
        assert not any(task.done() for task in early)
        await desk.give(1, b"job")
        await desk.hand_in(1, b"result")
        await desk.give(2, None)
        return [await task for task in early], await awaited, await desk.job(2)

    assert asyncio.run(a_day()) == ([b"job", b"job"], b"result", None)
