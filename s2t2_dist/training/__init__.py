"""One loop over the stages of a recipe, and the two kinds of stage.

Read `start` (from a recipe to a run), `loop`, `context` (the interface of a stage), `translate`,
`translate_checkpoint`, `finetune`, `schedule`; `preflight` is what is checked before, `nonfinite`
what is checked after.
"""
