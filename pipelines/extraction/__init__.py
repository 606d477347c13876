"""How `olavlm-extract` shares out shards, and does them.

A driver plans blocks of shards (`blocks`), finds places for workers (`places`) and hands blocks to them (`scheduler`),
through a crew (`crew`) that is one of Ray actors (`cluster`, alone in knowing Ray). A worker (`extractor`) prepares
images ahead in its threads (`preparer`), runs the teachers (`device`), encodes (`encoding`) and commits each shard
behind them (`shard_job`), and keeps time of all that (`stage_clock`). What it came to is told and kept by `summary` and
`record`; `preflight` is the dry run.
"""
