#!/usr/bin/env python
"""Load test of tools/serve.py: python tools/benchmark/serving.py IMAGES --pid PID"""

import argparse
import csv
import threading
import time
from pathlib import Path

import httpx
import numpy as np


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Send images to a running server from several clients at a time, with a bad '
        'upload among each ten, and print throughput, latencies and the memory of the server.'
    )
    parser.add_argument('images', nargs='+', type=Path)
    parser.add_argument('--url', default='http://127.0.0.1:8000/predict')
    parser.add_argument('--pid', type=int, help='process of the server, to measure its memory')
    parser.add_argument('--clients', nargs='+', type=int, default=[1, 8, 32])
    parser.add_argument('--seconds', type=float, default=20)
    parser.add_argument('--csv', type=Path, help='file that receives the table')
    return parser.parse_args()


def memory(pid: int | None) -> float:
    """Resident memory of a process and its descendants, in MiB."""
    if pid is None:
        return float('nan')
    children: dict[int, list[int]] = {}
    sizes = {}
    for status in Path('/proc').glob('[0-9]*/status'):
        try:
            lines = dict(line.split(':', 1) for line in status.read_text().splitlines())
        except (OSError, ValueError):
            continue
        number = int(status.parent.name)
        children.setdefault(int(lines['PPid']), []).append(number)
        sizes[number] = int(lines.get('VmRSS', '0').split()[0]) / 1024
    family = [pid]
    for member in family:
        family.extend(children.get(member, ()))
    return sum(sizes.get(member, 0) for member in family)


def load(url: str, images: list[bytes], clients: int, seconds: float) -> tuple[list, int]:
    """Latencies in seconds of the answered images, and the number of refused bad uploads."""
    latencies, refused, failures = [], [], []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        with httpx.Client(timeout=60) as session:
            i = number
            while time.perf_counter() < end and not failures:
                bad = i % 10 == 9
                content = b'no image' if bad else images[i % len(images)]
                start = time.perf_counter()
                answer = session.post(url, files={'request': content})
                if answer.status_code != (400 if bad else 200):
                    failures.append(f'{answer.status_code}: {answer.text[:200]}')
                elif bad:
                    refused.append(i)
                else:
                    latencies.append(time.perf_counter() - start)
                i += 1

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise SystemExit(f'a wrong answer: {failures[0]}')
    return latencies, len(refused)


def main() -> None:
    """Run the tool."""
    args = parse_args()
    images = [path.read_bytes() for path in args.images]
    load(args.url, images, 1, 2)
    columns = ('clients', 'images_per_s', 'p50_ms', 'p99_ms', 'refused', 'mib_before', 'mib_after')
    rows = []
    print(' '.join(f'{name:>12}' for name in columns))
    for clients in args.clients:
        before = memory(args.pid)
        latencies, refused = load(args.url, images, clients, args.seconds)
        p50, p99 = 1000 * np.percentile(latencies, (50, 99))
        speed = len(latencies) / args.seconds
        row = clients, speed, p50, p99, refused, before, memory(args.pid)
        rows.append([x if isinstance(x, int) else round(float(x), 1) for x in row])
        print(' '.join(f'{x:>12}' for x in rows[-1]), flush=True)
    if args.csv:
        with args.csv.open('w', newline='') as file:
            csv.writer(file, lineterminator='\n').writerows([columns, *rows])


if __name__ == '__main__':
    main()
