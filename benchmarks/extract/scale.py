"""docs/scale.md: what 558K, 10M and 1B images cost, by arithmetic from committed results and stated assumptions.

python -m benchmarks.extract.scale            render it anew
"""

from __future__ import annotations

from pathlib import Path

from ..figures import number, table
from ..prose import filled
from . import arithmetic as a
from .decode import DECODE, READ, name_of
from .facts import Device, Facts, load
from .scale_text import (
    BREAKS,
    BYTES,
    COMPUTE,
    COST,
    COST_READING,
    INTRODUCTION,
    NETWORK,
    OBJECTS,
    OPENING,
    OPENING_NOTES,
    PREPARING,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "scale.md"
STEPS = (1, 3, 10)  # seconds of a training step


def render(facts: Facts) -> str:
    """docs/scale.md."""
    return filled(
        [
            INTRODUCTION.format(extract=facts.cpu.name, cache=facts.cache_name, largest=f"{facts.opening.largest:,}"),
            BYTES.format(**facts.overhead),
            _block(_bytes()),
            OBJECTS,
            _block(_objects()),
            _compute(facts),
            _preparing(facts),
            _network(facts),
            _block(_reading()),
            _cost(facts),
            _opening(facts),
            _breaks(facts),
        ]
    )


def write() -> None:
    DOCUMENT.write_text(render(load()))


def _block(text: str) -> str:
    return f"\n{text}\n"


def _bytes() -> str:
    lines = []
    for codec in a.CODECS:
        for key, shape in a.TEACHERS.items():
            lines.append(_bytes_line(f"{key}, {codec}", a.row_bytes(shape, codec)))
        lines.append(_bytes_line(f"**all three, {codec}**", a.image_bytes(codec)))
    return table(["", "bytes an image", *(f"{name}, TB" for name in a.DATASETS)], lines)


def _bytes_line(what: str, size: int) -> list[str]:
    return [what, f"{size:,}", *(_small(size * rows / 1e12) for rows in a.DATASETS.values())]


def _objects() -> str:
    lines = [
        [f"{key} shards", *(f"{a.shards(shape, rows):,}" for rows in a.DATASETS.values())]
        for key, shape in a.TEACHERS.items()
    ]
    lines += [
        [f"files and records, {codec}", *(f"{a.objects(rows, codec):,}" for rows in a.DATASETS.values())]
        for codec in ("float16", "int8")
    ]
    return table(["", *a.DATASETS], lines)


def _total(facts: Facts) -> float:
    return sum(facts.cpu.gflop.values())


def _compute(facts: Facts) -> str:
    cpu = facts.cpu
    text = COMPUTE.format(
        gflop=", ".join(f"{key} {value:,.0f}" for key, value in cpu.gflop.items()),
        total=_total(facts),
        cpu=f"{cpu.hardware} ({cpu.name})",
        ratios=_among(cpu.bare[key] / cpu.pipeline[key] for key in a.TEACHERS),
        share=a.UTILISATION,
        peak=a.PEAK_FLOPS / 1e12,
        rate=a.gpu_rate(_total(facts)),
    )
    lines = []
    for device in (cpu, *facts.gpus):
        lines += _device_lines(device)
    for key, gflop in (*cpu.gflop.items(), ("**the three together**", _total(facts))):
        hours = [_small(a.gpu_hours(gflop, rows)) for rows in a.DATASETS.values()]
        lines.append([key, "a GPU, computed", number(a.gpu_rate(gflop)), *hours])
    header = ["teacher", "on", "images/s", *(f"{name}, hours" for name in a.DATASETS)]
    return text + _block(table(header, lines))


def _device_lines(device: Device) -> list[list[str]]:
    rates = {**device.pipeline, "**the three together**": device.together}
    return [
        [key, f"{device.hardware} (`{device.name}`)", number(rate)]
        + [_small(rows / rate / 3600) for rows in a.DATASETS.values()]
        for key, rate in rates.items()
    ]


def _prepare_ms(facts: Facts) -> float:
    return sum(facts.prepare_ms.values())


def _cores(facts: Facts) -> float:
    return a.gpu_rate(_total(facts)) * _prepare_ms(facts) / 1e3


def _core_hours(facts: Facts) -> float:
    return a.DATASETS["1B"] * _prepare_ms(facts) / 1e3 / 3600


def _preparing(facts: Facts) -> str:
    names = [READ, DECODE, *(name_of(key) for key in a.TEACHERS)]
    return PREPARING.format(
        steps=", ".join(f"{name} {facts.prepare_ms[name]:.1f} ms" for name in names),
        ms=_prepare_ms(facts),
        three=facts.three_decodes,
        rate=a.gpu_rate(_total(facts)),
        cores=_cores(facts),
        billion=_core_hours(facts),
    )


def _network(facts: Facts) -> str:
    rate = a.gpu_rate(_total(facts))
    return NETWORK.format(
        images=rate * a.IMAGE_BYTES / 1e6,
        kb=a.IMAGE_BYTES / 1e3,
        features=", ".join(f"{rate * a.image_bytes(codec) / 1e6:,.0f} MB/s ({codec})" for codec in a.CODECS),
        free=", ".join(f"{speed:,.0f} MB/s ({key})" for key, speed in facts.free.items()),
        disk=_among(facts.disk.values(), " MB/s", digits=0),
        batch=a.BATCH,
    )


def _reading() -> str:
    lines = []
    for codec in a.CODECS:
        megabytes = a.BATCH * a.image_bytes(codec) / 1e6
        lines.append(
            [codec, f"{megabytes:,.0f}"]
            + [f"{megabytes / step:,.0f} MB/s, {megabytes / step * 8 / 1e3:.2g} Gbit/s" for step in STEPS]
        )
    return table(["", "MB a step", *(f"a step of {step} s" for step in STEPS)], lines)


def _cost(facts: Facts) -> str:
    lines = []
    for codec in a.CODECS:
        for name, rows in a.DATASETS.items():
            hours = a.gpu_hours(_total(facts), rows)
            writes = a.all_shards(rows) * a.WRITES_A_SHARD / 1e6 * a.MILLION_WRITES
            lines.append(
                [
                    f"{name}, {codec}",
                    *map(_small, (hours, hours * a.GPU_HOUR, writes)),
                    *map(_small, (rows * a.image_bytes(codec) / 1e12, a.storage_price(rows, codec))),
                ]
            )
    header = ["", "GPU-hours, computed", "dollars", "dollars for writes", "TB", "dollars a month"]
    one = a.gpu_hours(_total(facts), 1) * a.GPU_HOUR
    reading = COST_READING.format(
        storage=a.storage_price(1, "float16") / one,
        int4=a.storage_price(1, "int4") / one,
        gen_tb=a.row_bytes(a.TEACHERS["gen"], "float16") * a.DATASETS["1B"] / 1e12,
    )
    prices = COST.format(
        gpu_hour=a.GPU_HOUR, tb_month=a.TB_MONTH, writes=a.MILLION_WRITES, writes_a_shard=a.WRITES_A_SHARD
    )
    return prices + _block(table(header, lines)) + reading


def _opening(facts: Facts) -> str:
    opening, (driver_rows, driver_s, driver_mb) = facts.opening, facts.driver
    text = OPENING.format(
        rows=opening.rows,
        shards=opening.shards,
        seconds=opening.seconds,
        mb=opening.mb,
        record=opening.record_seconds * 1e3,
        driver_rows=driver_rows,
        driver_s=driver_s,
        driver_mb=driver_mb,
    )
    lines = []
    for name, rows in a.DATASETS.items():
        shards = a.all_shards(rows)
        lines.append(
            [
                name,
                _seconds(opening.seconds_at(rows, shards)),
                _megabytes(opening.row_mb * rows),
                _seconds(opening.record_seconds * shards),
                _seconds(driver_s / driver_rows * rows),
                _megabytes(driver_mb / driver_rows * rows),
                f"{a.listings(rows):,}, {_seconds(a.listings(rows) * a.LISTING_SECONDS)}",
            ]
        )
    header = [
        "computed",
        "open",
        "memory",
        "more without an index",
        "driver lists in",
        "driver's memory",
        "LIST requests ¹",
    ]
    notes = OPENING_NOTES.format(keys=a.KEYS_A_LISTING, listing=a.LISTING_SECONDS)
    return text + _block(table(header, lines)) + notes


def _breaks(facts: Facts) -> str:
    small, medium, large = a.DATASETS.values()
    opening, (driver_rows, driver_s, driver_mb) = facts.opening, facts.driver
    hours = a.gpu_hours(_total(facts), large)
    folder = a.TEACHERS["depth"]

    def tb(rows: int, codec: str) -> float:
        return rows * a.image_bytes(codec) / 1e12

    return BREAKS.format(
        small_tb=tb(small, "float16"),
        small_int8=tb(small, "int8"),
        small_open=opening.seconds,
        cores=_cores(facts),
        write=a.gpu_rate(_total(facts)) * a.image_bytes("float16") / 1e6,
        medium_tb=tb(medium, "float16"),
        medium_int8=tb(medium, "int8"),
        medium_int4=tb(medium, "int4"),
        medium_driver=driver_s / driver_rows * medium,
        medium_driver_gb=driver_mb / driver_rows * medium / 1e3,
        medium_folder=a.shards(folder, medium),
        medium_mb=opening.row_mb * medium,
        large_tb=tb(large, "float16"),
        large_month=a.storage_price(large, "float16"),
        large_gpu=hours * a.GPU_HOUR,
        large_driver=driver_s / driver_rows * large / 60,
        large_driver_gb=driver_mb / driver_rows * large / 1e3,
        large_gb=opening.row_mb * large / 1e3,
        large_records=a.all_shards(large),
        large_listings=a.listings(large),
        large_minutes=a.listings(large) * a.LISTING_SECONDS / 60,
        large_folder=a.shards(folder, large),
        billion=_core_hours(facts),
        nodes=_core_hours(facts) / hours,
    )


def _small(value: float) -> str:
    """Three digits, or whole ones with commas."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _among(values, unit: str = "", digits: int = 2) -> str:
    low, high = min(found := list(values)), max(found)
    return f"{low:,.{digits}f} to {high:,.{digits}f}{unit}"


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 120 else f"{value / 60:.0f} min"


def _megabytes(value: float) -> str:
    return f"{value:,.0f} MB" if value < 10_000 else f"{value / 1e3:,.0f} GB"


if __name__ == "__main__":
    write()
