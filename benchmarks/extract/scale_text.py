"""The words of docs/scale.md, with places for the numbers of `scale.py`."""

from __future__ import annotations

INTRODUCTION = """\
# Scale

What it takes to extract and keep the features of LLaVA-558K, of 10 million and of a billion images, and what breaks
first. This page is written by `python -m benchmarks.extract.scale` from committed results
([extraction](../benchmarks/extract/README.md), run `{extract}`; [store](../benchmarks/cache/README.md), run `{cache}`)
and from assumptions, which are named where they are used. Nothing beyond {largest} rows was run: larger numbers are
straight lines through measured ones, and marked *computed*.

Three teachers at their published sizes: depth 576 x 1024, seg 576 x 1536, gen 1 x 1024 values an image; 128 rows a
shard, for gen 4096.
"""

BYTES = """
## Bytes

A row's features, its scales (int8, int4), checksums and its place in the shard's index. Commit records and the plan
come on top: in a float16 store measured with them, depth took {depth:.4f} and gen {gen:.4f} bytes for each byte of
features.
"""

OBJECTS = """
## Objects

A shard is a file and a commit record; with int8 and int4 the scales are a second file. Leases and staged files exist
only while a shard is written, a few a worker.
"""

COMPUTE = """
## Computing

Arithmetic, counted while the networks ran: {gflop}, together {total:,.0f} GFLOP an image.

Hours on {cpu} are its rows/s through the whole pipeline, measured; the same core runs the bare forward at {ratios} of
that. **Hours on a GPU are computed, not measured**, unless a line names a results file: {share:.0%} of the
{peak:.0f} TFLOP/s that an H100 SXM is sold with, {rate:,.0f} images a second for the three teachers together.
"""

PREPARING = """
## Preparing images

One core needs, for a 640 x 480 JPEG: {steps}; together {ms:.0f} ms, and {three:.2f} times that if each teacher decoded
for itself. So a GPU that does {rate:,.0f} images a second (computed) wants **{cores:,.0f} cores** to prepare them, and
a worker on a node with fewer waits for images: its summary says so. By the billion that is {billion:,.0f} core-hours.
"""

NETWORK = """
## Network and disks

Extracting, a GPU at that rate reads {images:,.0f} MB/s of images ({kb:.0f} KB each, assumed) and writes {features} of
features, which then cross the network to a shared store. For comparison, with teachers that cost nothing one
worker of the measured machine wrote {free}, and its disk took {disk} of plain files.

Training reads the targets of {batch} images a step, over all ranks together:
"""

COST = """
## Cost

    dollars = GPU-hours x price of a GPU-hour  +  TB x price of a TB-month x months

With examples of prices: {gpu_hour:.2f} a GPU-hour, {tb_month:.0f} a TB-month of object storage, {writes:.0f} a million
write requests ({writes_a_shard} a shard).
"""

COST_READING = """
Keeping float16 features of an image for a month costs {storage:.1f} times as much as computing them anew once at the
assumed utilisation ({int4:.1f} times as int4), at every scale. So a store pays where the targets are read often, on
disks that are there anyway, or where teachers in the training step cost more than their arithmetic: at one image at a
time they use a small part of a GPU, take its memory and stand in the critical path. A billion images read once is a
case for teachers in the loop, or for keeping gen alone: {gen_tb:,.1f} TB.
"""

OPENING = """
## Opening

Every process that reads a store holds its plan. {rows:,} rows with {shards:,} shards opened in {seconds:.2f} s and
{mb:.0f} MB, measured; records that the index lacks, as after a killed extraction, cost {record:.2f} ms each to read
again from a local disk. The driver lists what lacks before it starts: {driver_rows:,} rows of three teachers took
{driver_s:.1f} s and {driver_mb:,.0f} MB, measured.
"""

OPENING_NOTES = """
¹ One request for {keys:,} names, {listing:g} s each, one after the other (assumed).
"""

BREAKS = """
## What breaks first

**LLaVA-558K**: nothing. {small_tb:.2f} TB fit on one disk as float16, {small_int8:.2f} TB as int8; the plan opens in
{small_open:.1f} s. What limits is the cores beside the GPU ({cores:,.0f}), then the {write:,.0f} MB/s that the features
need to be written with.

**10M images**: the bytes. {medium_tb:.1f} TB as float16 is past the disks of one machine: int8 ({medium_int8:.1f} TB),
int4 ({medium_int4:.1f} TB), or an object store. A single driver still does: it lists the shards in
{medium_driver:.0f} s and {medium_driver_gb:.0f} GB. A folder has {medium_folder:,} records, which a local file system
does not mind and which a network file system lists slowly. Each process that reads needs {medium_mb:,.0f} MB for the
plan: ranks and loader workers that fork after opening share it, others do not.

**1B images**, in this order:

1. Money: {large_tb:,.0f} TB as float16 are {large_month:,.0f} dollars a month, against {large_gpu:,.0f} once for the
   GPUs.
2. The driver's memory: listing what lacks takes {large_driver_gb:,.0f} GB and {large_driver:.0f} minutes, before the
   first worker starts.
3. The plan in every reader: {large_gb:,.0f} GB each.
4. Listing: {large_records:,} records are {large_listings:,} LIST requests, {large_minutes:.0f} minutes one after the
   other, and a local folder of {large_folder:,} entries.
5. The cores: {billion:,.0f} core-hours to prepare the images, {nodes:.0f} for each GPU-hour.

Until then a data set of that size is best cut into parts of some ten million images, each with a store of its own and a
driver of its own, and `--shard-rows` raised (1024 rows are an eighth of the objects; a shard is the unit of retry too).
Reading several stores as one is not built.
"""
