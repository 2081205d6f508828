"""Ghost attention: `records` builds dialogues, `retention` counts kept instructions, `attention_map` shows them."""
