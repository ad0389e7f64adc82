from .api import bias_attention_2d as bias_attention_2d
