"""Proximal policy optimisation: `run` is the stage, `algorithm` one iteration of it, the rest its parts."""
