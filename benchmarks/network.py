"""Measure the cost of reading over a network: `Shuffled` and `Streamed` from a slow server against local files.

How. JPEGs are copied five times into plain tars of 250 in a temporary folder, with an index. A server in a separate
process (Python's `http.server` with ranges) serves them, each answer after a delay. A pass decodes batches with
``--workers`` worker processes; each pass runs in a new process, and its first batches (start of the workers,
connections, the index) are not counted. Local files, the server without delay and the server with delay are read in
turn; the results are ratios of the wall-clock rates of passes of one round. Memory: the resident set of a process
without workers, over the network against local. The sample ids of all passes are compared, to check that the order is
the same.

The server and the reader share the cores of this machine, unlike over a real network: the ratio to the server without
delay measures the delay alone, the ratio to local files includes the work of both ends of HTTP.

    OMP_NUM_THREADS=1 python benchmarks/network.py [--quick] [--delay 0.05] [--workers 2]
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _machine import add_sizes, describe, of_size, quartiles

from data import photographs, resident_mb, write
from lightning_tdisent.data.decode import Decoder
from lightning_tdisent.data.orders import Shuffled, Streamed
from lightning_tdisent.data.shards import Shards
from lightning_tdisent.lit.datamodule import ResumableLoader

SIZE, BATCH, PER_SHARD = 256, 20, 250
ORDERS = {"random": Shuffled, "sequential": Streamed}


class Slow(SimpleHTTPRequestHandler):
    """Serve files, whole or in ranges, each answer after ``delay`` seconds; a folder's listing is a page of links."""

    protocol_version = "HTTP/1.1"
    wbufsize = 2**20  # header and content are sent together
    disable_nagle_algorithm = True
    delay = 0.0

    def do_GET(self) -> None:
        """Send a file, or the requested range of it, after the delay."""
        time.sleep(self.delay)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        file = Path(self.translate_path(self.path))
        if not found or not file.is_file():
            super().do_GET()
            return
        first, last = (int(number) for number in found.groups())
        with file.open("rb") as stream:
            stream.seek(first)
            content = stream.read(last + 1 - first)
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{file.stat().st_size}")
        self.end_headers()
        self.wfile.write(content)

    def do_HEAD(self) -> None:
        """Send the header of a file after the delay."""
        time.sleep(self.delay)
        super().do_HEAD()

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


class Server(ThreadingHTTPServer):
    """HTTP server for many simultaneous connections."""

    request_queue_size = 1024
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Ignore readers that close their connection."""


def serve(folder: str, delay: float, ready: Any) -> None:
    """Serve ``folder`` until this process is terminated; send the port to ``ready``."""
    os.chdir(folder)
    Slow.delay = delay
    server = Server(("127.0.0.1", 0), Slow)
    ready.send(server.server_port)
    server.serve_forever()


def read(place: str, order: str, workers: int, batches: int, answer: Any) -> None:
    """Read one pass; send its images per second of wall clock, a hash of its ids, and the memory used in MB."""
    torch.set_num_threads(1)
    source = Shards.open(place, "train", Decoder(3, SIZE))
    before = resident_mb()
    loader = ResumableLoader(ORDERS[order](source, BATCH, seed=0), workers)
    stream = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    ids, start = hashlib.sha256(), 2 * max(1, workers)
    begin = time.perf_counter()
    for number, batch in enumerate(itertools.islice(stream, start + batches)):
        if number == start:
            begin = time.perf_counter()
        ids.update(str(batch["id"].tolist()).encode())
    # batch `start` was made before the clock started
    rate = BATCH * (batches - 1) / (time.perf_counter() - begin)
    answer.send(json.dumps([rate, ids.hexdigest(), resident_mb() - before]))
    loader.close()


def apart(work: Any, *args: Any) -> tuple[Any, Any]:
    """Start a function in a new process; return the process and the first object that it sends."""
    context = multiprocessing.get_context("fork")  # the global start method also affects a pass's loaders
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*args, there))
    process.start()
    there.close()
    try:
        return process, here.recv()
    except EOFError:
        process.join()
        sys.exit(f"{work.__name__}: a process has exited with {process.exitcode}")


def main() -> None:
    """Measure and print the result line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_sizes(parser, "fewer passes: under a minute on two cores")
    parser.add_argument("--images", type=Path, default=Path(os.environ.get("TDISENT_DATA", "data")) / "imagenet-sample")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    describe("fsspec", "aiohttp")
    jpegs = photographs(args.images, of_size(args, 2 * BATCH, 0, 0))
    batches, rounds = of_size(args, 3, 12, 40), of_size(args, 1, 1, 7)
    print(
        f"images: {len(jpegs)} five times, {sum(map(len, jpegs)) / len(jpegs) / 1e3:.0f} kB on average; {batches} "
        f"batches of {BATCH} per pass, {args.workers} workers, {args.delay * 1e3:.0f} ms before each answer"
    )
    servers = []
    with tempfile.TemporaryDirectory() as folder:
        write(jpegs * of_size(args, 1, 5, 5), Path(folder), PER_SHARD)
        places = {"local": folder}
        for name, delay in (("server", 0.0), ("slow", args.delay)):
            server, port = apart(serve, folder, delay)
            servers.append(server)
            places[name] = f"http://127.0.0.1:{port}"
        rates: dict[tuple[str, str], list[float]] = {(order, name): [] for order in ORDERS for name in places}
        memory: dict[str, list[float]] = {name: [] for name in places}
        try:
            for number in range(rounds):
                for order in ORDERS:
                    seen = set()
                    for name in list(places)[:: 1 if number % 2 else -1]:
                        process, found = apart(read, places[name], order, args.workers, batches)
                        process.join()
                        rate, ids, _ = json.loads(found)
                        rates[order, name].append(rate)
                        seen.add(ids)
                    assert len(seen) == 1, "the order differs"
            for name in ("local", "slow"):
                process, found = apart(read, places[name], "random", 0, min(batches, 10))
                process.join()
                memory[name].append(json.loads(found)[2])
        finally:
            for server in servers:
                server.terminate()
                server.join()
    print(f"\nimages/s, {rounds} passes, median [quartiles]")
    for (order, name), values in rates.items():
        print(f"  {order:10s} {name:7s} {quartiles(values)}")
    ratio = {
        (order, against): median(a / b for a, b in zip(rates[order, "slow"], rates[order, against], strict=True))
        for order in ORDERS
        for against in ("local", "server")
    }
    more = memory["slow"][0] - memory["local"][0]
    print(f"memory without workers: {more:+.0f} MB more than with local files")
    print(
        f"\nRESULT random_vs_no_delay={ratio['random', 'server']:.3f} random_vs_local={ratio['random', 'local']:.3f} "
        f"sequential_vs_no_delay={ratio['sequential', 'server']:.3f} "
        f"sequential_vs_local={ratio['sequential', 'local']:.3f} memory_mb={more:.0f}"
    )


if __name__ == "__main__":
    main()
