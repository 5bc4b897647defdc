"""Runs of ``parvis sample`` that are stopped, for several test files."""

from __future__ import annotations

from collections.abc import Callable


class Stopped(Exception):  # noqa: N818, as Ctrl-C
    """What stops a run."""


def stop_at(done: int) -> Callable[[int, int], None]:
    """An ``on_images`` that stops a run when so many images are there."""

    def on_images(now: int, _: int) -> None:
        if now >= done:
            raise Stopped

    return on_images
