"""Names of methods in a recipe, and what tables and model cards call them."""

# The ways to learn P: those of `ot.make_solver`.
METHODS = {
    "dykstra": "S2T2",
    "dual": "S2T2 (dual)",
    "dense": "Sinkhorn P (dense)",
    "plain": "Plain P",
}
# The starts of a finetune stage that need no training: those of `lm.init`.
INITS = {
    "mean": "mean of all rows",
    "gaussian": "drawn from all rows",
    "subtoken_mean": "mean of sub-tokens",
    "character_mean": "mean of characters",
    "focus": "FOCUS",
    "alignment": "imported alignment",
}
