"""Embeddings that a checkpoint will fill."""

from torch import nn


class Embedding(nn.Embedding):
    """`nn.Embedding`, left as it is on the meta device.

    Drawing normal values there imports `torch._dynamo`, which takes longer than all of torch.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
