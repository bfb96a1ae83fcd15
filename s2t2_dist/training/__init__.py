"""One loop over the stages of a recipe, and the two kinds of stage.

Read `loop`, `context` (the interface of a stage), `translate`, `translate_checkpoint`, `finetune`,
`schedule`; `preflight` is what is checked before, `nonfinite` what is checked after.
"""
