"""Invalid calls of bias_attention_2d."""

BAD_INPUTS = {"bias_attention_2d": ()}
