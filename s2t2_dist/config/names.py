"""Names of methods in a recipe, what tables and model cards call them, and texts of its keys."""

# The ways to learn P: those of `ot.make_solver`.
METHODS = {
    "dykstra": "S2T2",
    "dual": "S2T2 (dual)",
    "dense": "Sinkhorn P (dense)",
    "plain": "Plain P",
}
DUAL_DEFAULTS = {"iterations": 100, "tolerance": 1e-3}
WARM_DEFAULTS = {"warm_start_share": 0.9}
# The starts of a finetune stage that need no training: those of `lm.init`.
INITS = {
    "mean": "mean of all rows",
    "gaussian": "drawn from all rows",
    "subtoken_mean": "mean of sub-tokens",
    "character_mean": "mean of characters",
    "focus": "FOCUS",
    "alignment": "imported alignment",
}
PEAK_RATE = "peak learning rate"
DECAY = "AdamW's weight decay, as a share of the learning rate"
