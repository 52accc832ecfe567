"""How the store takes what 1 to 1,024 sources send: rates, lag, publishing, memory, by the number of shards.

`python -m tests.benchmarks.scale --sources 1,16,256 --shards 1,2,4 --shape resnet50 --width-scale 0.25 --ray` feeds
Ray actors, `--local` the store's classes in this process, `--memory` compares memory with its formula. `--write` puts
the tables into SCALE.md, each in place of the one of the same name. What does not fit the machine's memory is left
out, with a line that says the bytes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from delve_ray.store.memory import store_bytes
from tests.benchmarks import report
from tests.benchmarks.memory import mib
from tests.benchmarks.report import Section, markdown_cells
from tests.benchmarks.scale_constants import constants_section
from tests.benchmarks.scale_local import Figures, bare_add, measure_local
from tests.benchmarks.scale_memory import scale_memory_section
from tests.benchmarks.scale_ray import FEEDERS, OBJECTS_BYTES, measure_ray, scale_ray
from tests.benchmarks.scale_shapes import SHAPES, delta_bytes

PAGE = Path(__file__).with_name("SCALE.md")
SHARE = 0.7
"""Of the memory that is available now, what a run may take."""
HEADINGS = (
    "sources",
    "shards",
    "deltas/s",
    "MB/s",
    "roof",
    "lag, median",
    "largest",
    "behind",
    "published after",
    "in the stores",
    "CPU ms per delta",
)


def needed_bytes(widths: Sequence[int], sources: int, shards: int, *, through_ray: bool) -> int:
    """What a run takes at most, before anything is allocated: the stores, the senders' buffers and the object store.

    >>> needed_bytes([1024], 1, 1, through_ray=False) > 5 * delta_bytes([1024])
    True
    """
    stores = store_bytes(widths, windows=2, sources=sources, saved=through_ray, cores=psutil.cpu_count() or 1).peak
    buffers = delta_bytes(widths) * 3
    return stores + (OBJECTS_BYTES + buffers * FEEDERS if through_ray else buffers)


def too_large(needed: int, available: int) -> str | None:
    """In words, why a run is left out; None where it fits.

    >>> too_large(8 << 30, 4 << 30)
    'left out: it needs 8192.0 MiB, and 0.7 of what is available are 2867.2 MiB'
    >>> too_large(1 << 20, 4 << 30)
    """
    if needed <= SHARE * available:
        return None
    return f"left out: it needs {mib(needed)} MiB, and {SHARE:g} of what is available are {mib(SHARE * available)} MiB"


def cells(runs: Sequence[Figures], roof: float) -> tuple[str, ...]:
    """One line of the table out of several runs of the same: medians, and of lags the largest.

    `roof` is in deltas per second.
    """
    first = runs[0]
    rates = sorted(run.rate for run in runs)
    rate = statistics.median(rates)
    lags = np.concatenate([run.acks.lag for run in runs])
    cpu = {name: statistics.median(run.cpu_s[name] / run.deltas for run in runs) for name in first.cpu_s}
    spread = f" ({rates[0]:.0f} … {rates[-1]:.0f})" if len(runs) > 1 else ""
    return (
        str(first.sources),
        str(first.shards),
        f"{rate:.0f}{spread}",
        f"{1e-6 * rate * first.nbytes:.0f}",
        f"{rate / roof:.2f} of {roof:.0f}",
        f"{1e3 * np.median(lags):.1f} ms",
        f"{1e3 * lags.max():.1f} ms",
        str(max(run.acks.behind for run in runs)),
        f"{1e3 * statistics.median(run.publish_s for run in runs):.0f} ms",
        f"{statistics.median(run.held for run in runs) / first.nbytes:.2f} deltas",
        ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in cpu.items() if seconds > 0),
    )


def check(run: Figures) -> Figures:
    """The run, if the stores have got exactly what the sources sent. Raises RuntimeError."""
    if run.received != run.deltas * run.nbytes:
        raise RuntimeError(f"{run.received} bytes came of {run.deltas} deltas of {run.nbytes} bytes")
    return run


def table(options: argparse.Namespace, shape_name: str) -> Section:
    """All numbers of sources and shards with the layers of one network."""
    shape, through_ray = SHAPES[shape_name], options.way == "ray"
    widths = shape.scaled(options.width_scale)
    lines = []
    roof = 0.0
    with scale_ray() if through_ray else nullcontext():
        for sources in options.sources:
            for shards in options.shards:
                needed = needed_bytes(widths, sources, shards, through_ray=through_ray)
                if word := too_large(needed, psutil.virtual_memory().available):
                    lines.append((str(sources), str(shards), word, *[""] * (len(HEADINGS) - 3)))
                else:
                    if not (through_ray or roof):
                        roof = bare_add(widths, 1) / delta_bytes(widths)
                    measure: Callable[[], Figures] = partial(
                        measure_ray if through_ray else measure_local, widths, sources, shards, options.windows
                    )
                    runs = [check(measure()) for _ in range(options.repeat)]
                    empty = statistics.median(run.empty_rate for run in runs)
                    lines.append(cells(runs, empty if through_ray else roof))
                print("  ".join(lines[-1]), flush=True)
    return Section(
        f"{'Ray' if through_ray else 'In process'}, {shape.name} × {options.width_scale:g}",
        _text(options, shape_name, widths),
        markdown_cells(HEADINGS, lines),
    )


def _text(options: argparse.Namespace, shape_name: str, widths: Sequence[int]) -> str:
    shape = SHAPES[shape_name]
    out = ", ".join(f"{count} of {width}" for width, count in shape.left_out.items())
    scaled = "" if options.width_scale == 1 else f", their widths times {options.width_scale:g}"
    return (
        f"{shape.what}. {len(widths)} layers{scaled}{f'; left out as too wide: {out}' if out else ''}. A delta of one "
        f"phase has {1e-6 * delta_bytes(widths):.2f} MB; each source sends one per window, {options.windows} windows, "
        f"{options.repeat} runs. Machine: {psutil.cpu_count()} shared cores, on which the senders run as well."
    )


def write(sections: Sequence[Section], page: Path = PAGE) -> None:
    """Put sections into the page, each in place of the one of the same title."""
    head, *parts = page.read_text(encoding="utf-8").split("\n## ") if page.exists() else [HEAD]
    known = {part.partition("\n")[0]: part for part in parts}
    for section in sections:
        known[section.title] = str(section).removeprefix("## ")
    page.write_text("\n## ".join([head.rstrip() + "\n", *(part.rstrip() + "\n" for part in known.values())]), "utf-8")


HEAD = """\
# Scale

Written by `python -m tests.benchmarks.scale --write`; docs/scale.md says what follows from it.

roof: deltas per second of an actor that is called as often and does nothing (Ray), or of numpy's in-place addition of
the same arrays on one thread (in process). Every source has one delta on its way and offers its next window as soon as
it has its answers, waiting for no other. lag: from offering a delta to its ack, with all that is queued before it.
behind: the most windows by which the slowest source was ever behind the fastest. published after: from the last ack of
a window until its rows are in the Parquet file, the median of the windows; below 0 where that was before the sender
had seen its ack. in the stores: bytes of moments at the end, in deltas. CPU: of all processes of a kind, divided by
the number of deltas; a delta goes to every shard, and then to the front.
"""


def _numbers(text: str) -> list[int]:
    """
    >>> _numbers("1,4")
    [1, 4]
    """
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("numbers from 1 on, separated by commas")
    return numbers


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale", description=__doc__)
    parser.add_argument("--sources", type=_numbers, default="1,4,16,64,256,1024", metavar="N,N,…")
    parser.add_argument("--shards", type=_numbers, default="1,2,4", metavar="N,N,…")
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="resnet50", help="whose layers (resnet50)")
    parser.add_argument("--width-scale", type=float, default=0.25, help="what all widths are multiplied by (0.25)")
    parser.add_argument("--windows", type=int, default=3, help="windows of each source (3)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each line, of which the medians are shown (1)")
    way = parser.add_mutually_exclusive_group()
    for name, text in (
        ("ray", "actors, fed through Ray (the default)"),
        ("local", "the store's classes in this process"),
        ("memory", "memory against its formula"),
        ("constants", "what a delta, a byte, a decomposition, a call costs in CPU time"),
    ):
        way.add_argument(f"--{name}", dest="way", action="store_const", const=name, default="ray", help=text)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} beside this file")
    options = parser.parse_args(arguments)
    if options.windows < 1 or options.repeat < 1 or options.width_scale <= 0:
        parser.error("--windows and --repeat are at least 1, --width-scale is above 0")
    return options


def main() -> None:
    """Measure, print, and write what is asked for."""
    options = parse_options()
    if options.way == "memory":
        sections = [scale_memory_section()]
    elif options.way == "constants":
        sections = [constants_section()]
    else:
        sections = [table(options, name) for name in (SHAPES if options.shape == "all" else [options.shape])]
    about = report.machine()
    print("\n".join(map(str, sections)), "\n".join(f"{name}: {value}" for name, value in about.items()), sep="\n")
    if options.write:
        write(sections)


if __name__ == "__main__":
    main()
