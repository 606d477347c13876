"""docs/break-even.md: when a feature cache pays, by arithmetic on committed results and stated assumptions.

python -m benchmarks.train.page            render it anew
"""

from __future__ import annotations

from pathlib import Path

from olavlm.pipelines.break_even import bytes_per_second, runs_to_pay, storage_seconds, waiting

from ..extract.arithmetic import DATASETS, GPU_HOUR, PEAK_FLOPS, TB_MONTH, UTILISATION, image_bytes
from ..figures import number, table
from ..prose import filled
from .facts import Facts, load
from .page_text import (
    CHOICE,
    COSTS,
    DISKS,
    INTRODUCTION,
    MEMORY_KNOWN,
    MEMORY_UNKNOWN,
    MONEY,
    NOT_MEASURED,
    RUNS,
    RUNS_READING,
)
from .sizes import CACHED, ONE, ONLINE, TOKENS

DOCUMENT = Path(__file__).parents[2] / "docs" / "break-even.md"
DISK_RATES = {
    "NVMe": 3e9, "shared file system, 25 Gbit/s": 3e9, "object storage, 10 Gbit/s": 1.2e9, "SATA SSD": 5e8,
    "NFS, 1 Gbit/s": 1.1e8,
}  # fmt: skip
"""Bytes a second, examples."""
GPUS, MONTHS = (1, 8, 64), {"a month": 1, "6 months": 6}
DISK_CODECS, MONEY_CODECS = ("float16", "int8"), ("float16", "int8", "int4")
TEACHER_PARAMETERS = 303.6e6 + 195.2e6 + 632.1e6
"""Of the parts that are run: DINOv2-L, Swin-L, ViT-H/14."""


def render(facts: Facts) -> str:
    """docs/break-even.md."""
    return filled([_introduction(facts), _costs(facts), _runs(facts), _disks(facts), _money(facts), _choice(facts)])


def write() -> None:
    DOCUMENT.write_text(render(load()))


def _introduction(facts: Facts) -> str:
    size = image_bytes("float16")
    return INTRODUCTION.format(
        counted=facts.counted_in,
        extracted=facts.extracted_in,
        image=size,
        tb=size * DATASETS["LLaVA-558K"] / 1e12,
    )


def _costs(facts: Facts) -> str:
    computed = _computed(facts)
    text = COSTS.format(
        step=facts.tflop[TOKENS],
        cached=facts.tflop[CACHED],
        teachers=facts.teachers_gflop / 1e3,
        share=facts.teachers_gflop / 1e3 / facts.tflop[CACHED],
        rate=PEAK_FLOPS * UTILISATION / 1e12,
        utilisation=UTILISATION,
        peak=PEAK_FLOPS / 1e12,
        prepare=1e3 * facts.prepare_seconds,
    )
    lines = [["a GPU, computed", *(_ms(computed[what]) for what in (TOKENS, CACHED, ONLINE)),
              f"at least {_ms(computed[ONE])}", _ms(computed["extraction"])]]  # fmt: skip
    for run in facts.runs:
        once = _ms(run.extraction) if run.extraction is not None else "not measured"
        added = [_ms(run.added(arm)) for arm in (ONLINE, ONE)]
        where = f"{run.hardware}, {run.title} (`{run.name}`)"
        lines.append([where, _ms(run.seconds[TOKENS]), _ms(run.seconds[CACHED]), *added, once])
    header = ["ms an image", "no distillation", "cached targets", "teachers add, batched", "teachers add, one by one"]
    return text + _block(table([*header, "extraction, once"], lines)) + ("" if _on_gpu(facts) else NOT_MEASURED)


def _computed(facts: Facts) -> dict[str, float]:
    """Seconds an image of the assumed GPU; for `ONLINE` and `ONE` what the teachers add."""
    teachers = facts.gpu_seconds(facts.teachers_gflop)
    steps = {arm: facts.gpu_seconds(1e3 * tflop) for arm, tflop in facts.tflop.items()}
    return {**steps, ONLINE: teachers, ONE: teachers + facts.prepare_seconds, "extraction": teachers}


def _runs(facts: Facts) -> str:
    computed = _computed(facts)
    lines = [["a GPU, computed", *(_pays(computed["extraction"], computed[arm]) for arm in (ONLINE, ONE))]]
    for run in facts.runs:
        if run.extraction is not None:
            lines.append([f"`{run.name}`", *(_pays(run.extraction, run.added(arm)) for arm in (ONLINE, ONE))])
    header = ["pays from", "against batched teachers", "against one image at a time"]
    return RUNS + _block(table(header, lines)) + RUNS_READING


def _disks(facts: Facts) -> str:
    computed = _computed(facts)
    step = computed[CACHED]
    text = DISKS.format(ms=1e3 * step, depth=facts.reading["depth"] / 1e6)
    header, needed = ["", *(f"{_gpus(g)}, {c}" for g in GPUS for c in DISK_CODECS)], ["needed, MB/s"]
    for gpus in GPUS:
        needed += [number(bytes_per_second(image_bytes(codec), step, gpus) / 1e6) for codec in DISK_CODECS]
    lines = [needed]
    for name, rate in DISK_RATES.items():
        line = [f"{name}, {rate / 1e6:,.0f} MB/s"]
        for gpus in GPUS:
            for codec in DISK_CODECS:
                stands = waiting(image_bytes(codec), step, gpus, gpus, rate)
                line.append("enough" if not stands else _pays(computed["extraction"], computed[ONLINE], stands))
        lines.append(line)
    return text + _block(table(header, lines))


def _money(facts: Facts) -> str:
    computed, size = _computed(facts), image_bytes("float16")
    month = 1e3 * storage_seconds(size, 1, TB_MONTH, GPU_HOUR)
    kept = {"a disk that is there anyway": 0.0}
    for codec in MONEY_CODECS:
        for words, months in MONTHS.items():
            kept[f"{codec}, {words}"] = storage_seconds(image_bytes(codec), months, TB_MONTH, GPU_HOUR)
    lines = [
        [what, *(str(runs_to_pay(computed["extraction"] + seconds, computed[arm])) for arm in (ONLINE, ONE))]
        for what, seconds in kept.items()
    ]
    text = MONEY.format(tb_month=TB_MONTH, gpu_hour=GPU_HOUR, month=month)
    return text + _block(table(["", "against batched teachers", "against one image at a time"], lines))


def _choice(facts: Facts) -> str:
    gpus = [run for run in facts.runs if {CACHED, ONLINE} <= run.memory.keys()]
    if gpus:
        run = gpus[-1]
        memory = MEMORY_KNOWN.format(mb=run.memory[ONLINE] - run.memory[CACHED], name=f"`{run.name}`")
    else:
        memory = MEMORY_UNKNOWN.format(gb=2 * TEACHER_PARAMETERS / 1e9)
    return CHOICE.format(cores=facts.prepare_seconds / _computed(facts)[CACHED], memory=memory)


def _pays(extraction: float, teachers: float, stands: float = 0.0) -> str:
    runs = runs_to_pay(extraction, teachers, stands)
    return "never" if runs is None else f"run {runs}"


def _on_gpu(facts: Facts) -> bool:
    return any(run.gpu for run in facts.runs)


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _ms(seconds: float) -> str:
    return number(1e3 * seconds)


def _block(text: str) -> str:
    return f"\n{text}\n"


if __name__ == "__main__":
    write()
