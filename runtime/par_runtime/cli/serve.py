"""``parvis serve``: images of a bundle over HTTP, for browsers, curl, and programs that speak OpenAI's form."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from par_runtime.arguments import number, whole
from par_runtime.batcher import MOST_WAITING, Batcher
from par_runtime.bundle import Bundle
from par_runtime.cli import options
from par_runtime.cli.common import Parser, guarded, printable
from par_runtime.cli.inputs import load_pipeline, say_why_on_the_cpu
from par_runtime.late import importing
from par_runtime.pipeline import Pipeline

HOST, PORT = "127.0.0.1", 8000
DRAIN_S = 30.0
MOST_S = 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0 after a signal, or 2 on bad input."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args), "--max-batch, --max-waiting")


def run(args: argparse.Namespace) -> int:
    """Check the options, take the port, load the bundle, and answer requests until a signal comes."""
    _check(args)
    with importing("par_runtime.server.run"):
        from par_runtime.server.app import application, check_makes_images
        from par_runtime.server.run import Once, bound, more_descriptors, serve, url

    bundle = Bundle.open(args.bundle)
    check_makes_images(bundle)
    more_descriptors()
    with bound(args.host, args.port) as listening:
        pipeline = load_pipeline(args, bundle, selftest=not args.no_selftest)
        say_why_on_the_cpu(args, pipeline)
        batcher = Batcher(
            pipeline, max_batch=args.max_batch, max_wait_ms=args.max_wait_ms, max_waiting=args.max_waiting
        )
        if not args.no_warm_up:
            _warm_up(pipeline, batcher.max_batch)
        app = application(batcher, name=args.name, timeout_s=args.timeout)
        about = f"{bundle.name}, {pipeline.backend.info.name}, in calls of up to {batcher.max_batch}"
        line = printable(f"{url(listening)}  ({about})")
        with _logged(args, Once()):
            serve(app, listening, args.drain, lambda: None if args.quiet else print(line, flush=True))
        batcher.close(cancel=True)
        pipeline.close()
        if not args.quiet:
            print(f"stopped after {batcher.images} images in {batcher.calls} calls", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise RequestError for what no server can be run with, before anything is loaded."""
    options.check_counts(args, "max_batch", "max_waiting")
    whole("--port", args.port, 0, 65535)
    number("--max-wait-ms", args.max_wait_ms, 0, MOST_S, f"0 to {MOST_S:.0f} milliseconds")
    number("--timeout", args.timeout, 0.001, MOST_S, f"0.001 to {MOST_S:.0f} seconds")
    number("--drain", args.drain, 1, MOST_S, f"1 to {MOST_S:.0f} seconds")


def _warm_up(pipeline: Pipeline, most: int) -> None:
    """Make one image, and a whole batch: what is allocated or compiled at first is there before the first request, and
    what does not fit into memory ends the command now.
    """
    for count in dict.fromkeys((1, most)):
        pipeline.generate([0] * count, seed=0, max_batch=count)


@contextmanager
def _logged(args: argparse.Namespace, once: logging.Filter) -> Iterator[None]:
    """Errors of requests on standard error, and with ``--access-log`` a line for each request. ``once``: lets equal
    messages of the event loop pass now and then.
    """
    handler, rare = logging.StreamHandler(sys.stderr), logging.StreamHandler(sys.stderr)
    rare.addFilter(once)
    for each in (handler, rare):
        each.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    kinds = {"par_runtime.server": handler, "par_runtime.batcher": handler, "uvicorn.error": rare, "asyncio": rare}
    if args.access_log:
        kinds["uvicorn.access"] = handler
    for name, each in kinds.items():
        logger = logging.getLogger(name)
        logger.addHandler(each)
        logger.setLevel(logging.INFO if name == "uvicorn.access" else logging.WARNING)
    try:
        yield
    finally:
        for name, each in kinds.items():
            logging.getLogger(name).removeHandler(each)


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis serve``."""
    p = Parser(
        prog="parvis serve",
        description="Answer requests for images over HTTP: / is a page for a browser, /v1/images?label=0&seed=7 an "
        "image, /v1/images/generations takes requests of OpenAI's clients, /health and /metrics are for operators. "
        "Requests that wait are made in common calls. Ctrl-C or SIGTERM: what was taken is answered, then exit code 0. "
        "docs/service.md lists all of it.",
    )
    options.add_bundle(p)
    p.add_argument("--host", default=HOST, help=f"address to listen at; 0.0.0.0 is every one (default: {HOST})")
    p.add_argument("--port", type=int, default=PORT, help=f"0 takes any that is free (default: {PORT})")
    p.add_argument("--name", type=options.text, help="of the model, in answers (default: the bundle's)")
    p.add_argument("--max-batch", type=int, help="most images of a call (default: 8, or what the backend takes)")
    p.add_argument(
        "--max-wait-ms",
        type=float,
        default=0.0,
        help="how long the oldest request waits for others to fill its call (default: 0; calls fill while others run)",
    )
    p.add_argument(
        "--max-waiting",
        type=int,
        default=MOST_WAITING,
        help=f"images that may wait; requests for more are answered with 503 (default: {MOST_WAITING})",
    )
    p.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="until a request is answered with 504 (default: 60)",
    )
    p.add_argument(
        "--drain",
        type=float,
        default=DRAIN_S,
        metavar="SECONDS",
        help=f"after a signal, how long requests that were taken may still take (default: {DRAIN_S:g})",
    )
    p.add_argument("--access-log", action="store_true", help="a line on standard error for each request")
    p.add_argument("--no-warm-up", action="store_true", help="make no image and no batch before the port is opened")
    options.add_common(p, "print neither the address nor the last line")
    options.add_no_selftest(p)
    return p
