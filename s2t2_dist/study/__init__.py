"""`s2t2 study`: many runs of one recipe, and the table, figure and record that they give.

Read `config` (the study file and its runs), `schedule` (which run is started when, in `work`'s
processes), `measure` and `halves` (what is measured of a finished run), `statistics` (mean, spread,
the best rate), then `results` and `figure`.
"""
