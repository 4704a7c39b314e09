"""The published masked transformer in PyTorch, as small as its key names allow."""

import torch
from torch import nn


class _Residual(nn.Module):
  """Layer norm before a function whose result is added."""

  def __init__(self, dim: int, fn: nn.Module):
    super().__init__()
    self.norm, self.fn = nn.LayerNorm(dim), fn

  def forward(self, x):
    return x + self.fn(self.norm(x))


class _Attention(nn.Module):
  def __init__(self, dim: int, heads: int):
    super().__init__()
    self.mha = nn.MultiheadAttention(dim, heads, batch_first=True)

  def forward(self, x):
    return self.mha(x, x, x, need_weights=False)[0]


class _Mlp(nn.Module):
  def __init__(self, dim: int, hidden: int):
    super().__init__()
    layers = nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, dim)
    self.net = nn.Sequential(*layers)

  def forward(self, x):
    return self.net(x)


class _Blocks(nn.Module):
  def __init__(self, dim: int, depth: int, heads: int, hidden: int):
    super().__init__()
    self.layers = nn.ModuleList(
      nn.ModuleList([_Residual(dim, _Attention(dim, heads)), _Residual(dim, _Mlp(dim, hidden))])
      for _ in range(depth)
    )

  def forward(self, x):
    for attention, mlp in self.layers:
      x = mlp(attention(x))
    return x


class MaskTransformer(nn.Module):
  """Logits of codes and mask id; fields as in our network's settings."""

  def __init__(
    self,
    num_tokens: int,
    codebook_size: int,
    num_classes: int,
    hidden_dim: int,
    num_layers: int,
    num_heads: int,
    mlp_dim: int,
    **unused,
  ):
    super().__init__()
    d, table = hidden_dim, codebook_size + 1 + num_classes + 1
    self.codebook_size, self.num_tokens = codebook_size, num_tokens

    def norm():
      return nn.LayerNorm(d, eps=1e-12)

    none = nn.Dropout(0.0)
    self.tok_emb = nn.Embedding(table, d)
    self.pos_emb = nn.Parameter(torch.zeros(1, num_tokens + 1, d))
    self.bias = nn.Parameter(torch.zeros(num_tokens + 1, table))
    self.first_layer = nn.Sequential(
      norm(), none, nn.Linear(d, d), nn.GELU(), norm(), none, nn.Linear(d, d)
    )
    self.transformer = _Blocks(d, num_layers, num_heads, mlp_dim)
    self.last_layer = nn.Sequential(norm(), none, nn.Linear(d, d), nn.GELU(), norm())

  def forward(self, tokens, labels):
    classes = self.codebook_size + 1 + labels
    x = self.tok_emb(torch.cat([tokens, classes[:, None]], dim=1)) + self.pos_emb
    x = self.last_layer(self.transformer(self.first_layer(x)))
    logits = x @ self.tok_emb.weight.T + self.bias
    return logits[:, : self.num_tokens, : self.codebook_size + 1]
