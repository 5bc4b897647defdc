"""The suite ``serve``: requests that arrive at random, as users' do, and how long each of them waits.

It is an open loop: requests arrive with exponential gaps, whether or not earlier ones are done. So it shows waiting
times, which a closed loop hides. Whenever the subject is free, it takes all requests that wait, up to the largest
batch. That is the simplest scheduler; a real one can only be better. The latency of a request is from its arrival to
its image. Requests and time are limited, and no network is used.

The offered loads are shares of the throughput of the largest batch, which is measured first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from par_runtime.bench import machine
from par_runtime.bench.machine import Watch
from par_runtime.bench.measure import Progress, Setting, attempt, make_row, process_ids, summarize
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import Subject

SHARES = (0.3, 0.6, 0.9)  #: of the throughput of the largest batch
LARGEST_BATCH = 8
REQUESTS = 32
SECONDS = 60.0  #: how long one load may take; requests that have not arrived by then are not sent


def arrivals(count: int, per_s: float, seed: int = 0) -> list[float]:
    """Seconds from the start at which ``count`` requests arrive."""
    gaps = np.random.default_rng(seed).exponential(1 / per_s, count)
    return [float(at) for at in np.cumsum(gaps) - gaps[0]]


def serve(
    subjects: Sequence[Subject],
    setting: Setting,
    progress: Progress,
    largest: int = LARGEST_BATCH,
    requests: int = REQUESTS,
    seconds: float = SECONDS,
) -> list[Row]:
    """A row per subject and load: the latencies of all requests, and the throughput that was reached."""
    rows: list[Row] = []
    this_machine = machine.describe(setting.gpu)
    sized = replace(setting, images=largest)
    for subject in subjects:
        label = subject.info.label
        progress(f"{label}: what a batch of {largest} takes")
        full_s = attempt(subject, subjects, setting, partial(full_batch_s, subject, setting, largest, seconds))
        for share in SHARES if full_s else ():
            setting.between()
            offered = share * largest / (full_s or 1.0)
            progress(f"{label}: {offered:.3g} requests a second, {share:.0%} of the most")
            watch = Watch(process_ids(subject), setting.gpu)
            load = partial(serve_load, subject, setting.guided, arrivals(requests, offered), largest, seconds)
            served = attempt(subject, subjects, setting, load)
            if served is None:
                break
            latencies, took_s = served
            rows.append(
                make_row(
                    subject.info,
                    sized,
                    this_machine,
                    "serve",
                    latencies,
                    summarize([watch.flags()]),
                    images_per_s=len(latencies) / took_s,
                    offered_per_s=offered,
                )
            )
            setting.keep("serve", lambda: rows)
    return rows


def full_batch_s(subject: Subject, setting: Setting, largest: int, seconds: float = SECONDS) -> float:
    """Seconds of a batch of the ``largest`` size, after buffers of every size were made, as far as ``seconds`` go.

    The largest one is first: whether it fits is known at once.
    """
    end = time.monotonic() + seconds
    for size in (largest, *range(1, largest)):
        subject.run(size, setting.guided, 24)
        if time.monotonic() > end:
            break
    return subject.run(largest, setting.guided).image_ms / 1e3


def serve_load(
    subject: Subject, guided: bool, due: Sequence[float], largest: int, seconds: float
) -> tuple[list[float], float]:
    """Latency in ms of each request of ``due`` (seconds from now), and how long all took, in seconds."""
    latencies: list[float] = []
    began, waiting, next_up = time.perf_counter(), list[float](), 0
    while next_up < len(due) or waiting:
        now = time.perf_counter() - began
        while next_up < len(due) and due[next_up] <= now:
            waiting.append(due[next_up])
            next_up += 1
        if now >= seconds:
            next_up = len(due)
        if not waiting:
            if next_up < len(due):
                time.sleep(max(0.0, min(due[next_up], seconds) - (time.perf_counter() - began)))
            continue
        taken, waiting = waiting[:largest], waiting[largest:]
        subject.run(len(taken), guided)
        done = time.perf_counter() - began
        latencies += [1e3 * (done - arrived) for arrived in taken]
    return latencies, time.perf_counter() - began
