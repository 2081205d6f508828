"""Text from a model on the training ranks: sampling (`sampling`), keys and values of earlier tokens (`cache`),
sequences that enter and leave while others go on (`batching`), requests over all replicas (`generator`), the training
weights in a layout for generation (`consolidate`), and the stages `generate` and `chat`.

The command line imports each stage by its own name, so this face imports nothing.
"""
