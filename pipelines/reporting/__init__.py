"""How `olavlm-report` looks at runs, and the page that it makes of them.

`runs` reads run folders and finds what needs a look, `probe_scores` what `olavlm-probe eval` left. Blocks are functions
(run, settings) -> HTML, '' when there is nothing to show: `overview`, `curves`, `training_pictures`, `features`,
`answers`. What they draw with is `chart` (over steps), `layer_chart` (over layers) and `page`, in the colours of
`style`. `predictions` alone runs a model.
"""
