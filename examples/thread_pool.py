# SPDX-License-Identifier: Apache-2.0
"""A small shop that hands its work to a thread pool. Plain OpenTelemetry: nothing in here knows
that it may be profiled.

Run it as it is, or under ``opentelemetry-instrument python examples/thread_pool.py``.

Two server threads handle requests at the same time and share one pool. Each kind of work burns its
CPU in a function of its own, so that a profile can be held against this table: a sample with the
function on its stack belongs to the span named beside it, in the request named beside that.

function                runs on                 span                    request
----------------------  ----------------------  ----------------------  ----------------------
check_credentials       http-1                  POST /checkout          POST /checkout
reserve_stock           http-1                  reserve stock           POST /checkout
price_basket            pool                    price basket            POST /checkout
convert_currency        pool, nested submit     price basket            POST /checkout
score_fraud             pool                    score fraud             POST /checkout
match_fraud_rules       pool                    match rules             POST /checkout
render_receipt          http-1                  render receipt          POST /checkout
parse_invoice           pool                    parse invoice           POST /invoices/{batch}
verify_signature        pool                    verify signature        POST /invoices/{batch}
archive_invoice         pool, nested submit     archive invoice         POST /invoices/{batch}
summarise_batch         http-2                  POST /invoices/{batch}  POST /invoices/{batch}
list_products           http-1, http-2          GET /products           GET /products
compact_cache           pool, after a request   none                    none
refresh_exchange_rates  exchange-rates          none                    none
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from opentelemetry import trace
from opentelemetry.trace import SpanKind

tracer = trace.get_tracer("shop")
pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="shop-pool")


def _until(cpu_ms: float) -> float:
    """The reading of this thread's CPU clock at which `cpu_ms` of work are done."""
    return time.thread_time() + cpu_ms / 1000


# --- the work: one function for each kind ---------------------------------------------------------


def check_credentials(cpu_ms: float) -> int:
    end, rounds = _until(cpu_ms), 0
    while time.thread_time() < end:
        hashlib.sha256(b"salt" * 8 + bytes(rounds % 256)).hexdigest()
        rounds += 1
    return rounds


def reserve_stock(cpu_ms: float) -> int:
    end, shelf = _until(cpu_ms), 17
    while time.thread_time() < end:
        for place in range(200):
            shelf = (shelf * 31 + place) % 10_007
    return shelf


def price_basket(cpu_ms: float) -> float:
    end, total = _until(cpu_ms), 0.0
    while time.thread_time() < end:
        for item in range(200):
            total += item * 0.19 - total / 1000
    return total


def convert_currency(cpu_ms: float) -> float:
    end, amount = _until(cpu_ms), 100.0
    while time.thread_time() < end:
        for rate in range(1, 200):
            amount = amount * (1 + 1 / rate) % 1000
    return amount


def score_fraud(cpu_ms: float) -> int:
    end, score = _until(cpu_ms), 1
    while time.thread_time() < end:
        for signal in range(200):
            score = (score << 1 ^ signal) & 0xFFFF
    return score


def match_fraud_rules(cpu_ms: float) -> int:
    end, matches = _until(cpu_ms), 0
    rule = re.compile(r"(\d+)-([a-z]+)-(\d+)")
    while time.thread_time() < end:
        matches += len(rule.findall("order 4711-checkout-99 from 10-downing-4 " * 4))
    return matches


def render_receipt(cpu_ms: float) -> int:
    end, length = _until(cpu_ms), 0
    while time.thread_time() < end:
        length = len("".join(f"<li>{item}: {item * 1.19:.2f}</li>" for item in range(40)))
    return length


def parse_invoice(cpu_ms: float) -> int:
    end, fields = _until(cpu_ms), 0
    row = "4711;2026-03-01;ACME;100.00;19.00;119.00;EUR"
    while time.thread_time() < end:
        fields += len(row.split(";"))
    return fields


def verify_signature(cpu_ms: float) -> int:
    end, signature = _until(cpu_ms), 65_537
    while time.thread_time() < end:
        signature = pow(signature, 3, 2**61 - 1) + 1
    return signature


def archive_invoice(cpu_ms: float) -> int:
    end, written = _until(cpu_ms), 0
    while time.thread_time() < end:
        written += len(bytes(range(256)).hex())
    return written


def summarise_batch(cpu_ms: float) -> int:
    end, lines = _until(cpu_ms), 0
    while time.thread_time() < end:
        lines += len(sorted(f"line {number % 7}" for number in range(40)))
    return lines


def list_products(cpu_ms: float) -> int:
    end, listed = _until(cpu_ms), 0
    while time.thread_time() < end:
        listed += len({number: str(number) for number in range(50)})
    return listed


def compact_cache(cpu_ms: float) -> int:
    end, kept = _until(cpu_ms), 0
    while time.thread_time() < end:
        kept += sum(1 for age in range(100) if age % 3)
    return kept


def refresh_exchange_rates(cpu_ms: float) -> float:
    end, rate = _until(cpu_ms), 1.0
    while time.thread_time() < end:
        for step in range(200):
            rate = rate * 0.999 + step / 1000
    return rate


# --- the requests ---------------------------------------------------------------------------------


def handle_checkout(items: int) -> None:
    """Prices the basket and scores the order side by side."""
    check_credentials(15)
    with tracer.start_as_current_span("reserve stock"):
        reserve_stock(30)
    with tracer.start_as_current_span("price basket", attributes={"basket.items": items}):
        # Pricing opens no span of its own: it works for the one that it was submitted under.
        prices = [pool.submit(price_item) for _ in range(items)]
        fraud = pool.submit(score_order)
        for future in (*prices, fraud):
            future.result()
    with tracer.start_as_current_span("render receipt"):
        render_receipt(25)


def price_item() -> None:
    price_basket(50)
    # Submitted from inside a worker, and not waited for: all the workers could be waiting.
    pool.submit(convert_currency, 15)


def score_order() -> None:
    """A child span in the worker, and one below it."""
    with tracer.start_as_current_span("score fraud"):
        score_fraud(40)
        with tracer.start_as_current_span("match rules"):
            match_fraud_rules(50)


def handle_invoices(invoices: int) -> None:
    """Takes in a batch of invoices, side by side."""
    taken = [pool.submit(take_invoice) for _ in range(invoices)]
    for future in taken:
        future.result()
    summarise_batch(20)


def take_invoice() -> None:
    """A child span in the worker, one below it, and one in a task submitted from there."""
    with tracer.start_as_current_span("parse invoice"):
        parse_invoice(30)
        with tracer.start_as_current_span("verify signature"):
            verify_signature(25)
            pool.submit(store_invoice)


def store_invoice() -> None:
    with tracer.start_as_current_span("archive invoice"):
        archive_invoice(15)


def handle_products(_: int) -> None:
    """Quick, and without the pool."""
    list_products(12)


# --- the server -----------------------------------------------------------------------------------

HANDLERS = {
    "POST /checkout": handle_checkout,
    "POST /invoices/{batch}": handle_invoices,
    "GET /products": handle_products,
}

# What the clients of the two server threads ask for, over and over, and how much of it.
TRAFFIC = {
    "http-1": [("POST /checkout", 2), ("GET /products", 1), ("POST /checkout", 5)],
    "http-2": [("POST /invoices/{batch}", 8), ("GET /products", 1), ("POST /invoices/{batch}", 2)],
}


def handle(request: str, size: int) -> None:
    method, route = request.split()
    started = time.perf_counter()
    with tracer.start_as_current_span(
        request,
        kind=SpanKind.SERVER,
        attributes={"http.request.method": method, "http.route": route},
    ):
        HANDLERS[request](size)
    print(f"{request} {1000 * (time.perf_counter() - started):.0f} ms", flush=True)


def serve(requests: list[tuple[str, int]], deadline: float) -> None:
    for request, size in itertools.cycle(requests):
        if time.monotonic() >= deadline:
            return
        handle(request, size)
        # Nobody's request. It must not be charged to the one that kept this worker busy before.
        pool.submit(compact_cache, 8)
        time.sleep(0.01)  # the client thinks


def keep_exchange_rates_fresh(stopped: threading.Event) -> None:
    while not stopped.wait(0.2):
        refresh_exchange_rates(25)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small shop that hands its work to a pool.")
    parser.add_argument("--duration", type=float, default=6.0, help="seconds to serve (default: 6)")
    deadline = time.monotonic() + parser.parse_args().duration

    stopped = threading.Event()
    rates = threading.Thread(
        target=keep_exchange_rates_fresh, args=(stopped,), name="exchange-rates"
    )
    servers = [
        threading.Thread(target=serve, args=(requests, deadline), name=name)
        for name, requests in TRAFFIC.items()
    ]
    for thread in (rates, *servers):
        thread.start()
    for thread in servers:
        thread.join()
    stopped.set()
    rates.join()
    pool.shutdown()


if __name__ == "__main__":
    main()
