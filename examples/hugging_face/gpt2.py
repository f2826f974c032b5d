"""Hugging Face's GPT-2 as a model for fedmpi: samples in, one tensor of logits out."""

from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel


class Gpt2(nn.Module):
    """Token ids [N, T] -> logits [N, T, vocabulary]. For published weights: GPT2LMHeadModel.from_pretrained(name)."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=layers, n_head=2,
            bos_token_id=None, eos_token_id=None, use_cache=False,
        )  # fmt: skip
        self.lm = GPT2LMHeadModel(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm(input_ids=x).logits
