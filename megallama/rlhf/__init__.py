"""Learning from preferences: `rejection` sampling, `ppo`, and `ghost` attention, which keeps an instruction over turns.

What they share lies beside them: `judges` (the reward models), `prompts`, `chat_model` (a model that answers dialogues)
and `parts` (long work that is kept piece by piece). Each is imported by its own name, so this face imports nothing.
"""
