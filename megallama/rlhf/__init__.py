"""Learning from preferences: from the scores of the reward models to a better policy.

`rewards` makes one reward of two models' scores and lays it on answer tokens, `advantages` spreads it over them, and
`losses` are what policy and critic then minimise: pure functions of tensors. Rows of answers are ragged and lie back to
back in flat tensors cut by `bounds`, as in Batch: nothing is padded. Each is imported by its own name, so this face
imports nothing.
"""
