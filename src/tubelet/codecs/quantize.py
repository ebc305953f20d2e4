"""Lookup-free quantisation: a latent of d numbers becomes d signs, which are a word of a vocabulary of 2^d.

After MAGVIT-v2 (Yu et al. 2023, section 3.1): q(z) = sign(z), the token is the number whose bits are the signs, least
significant first, and no table of codes exists. The encoder learns through the sign as if it were the identity. A penalty on
entropy makes it certain about every token (E[H(q(z))] is small) and lets it use the whole vocabulary (H(E[q(z)]) is large). No
activation stands before the sign; a norm before the encoder's last convolution keeps z in scale.

Everything here has the latent's channels last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.errors import UserError

TEMPERATURE = 0.01
"""Of public implementations; the paper prints none."""
MOST_BITS = 24
"""Of the batch's entropy, which holds the probability of every word: 2^24 of them are 64 MiB."""


def quantize(z: Tensor) -> Tensor:
    """The signs of `z (..., d)`, 1 or -1, in its dtype; the gradient passes as if this were the identity.

    The sign of 0 is -1, as a bit is set only where z > 0.
    """
    signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
    # Not z + (signs - z): its rounding would leave signs that are almost 1.
    return signs + (z - z.detach())


def to_ids(z: Tensor) -> Tensor:
    """Tokens `(...)` in [0, 2^d) of latents or signs `(..., d)`: the sum of 2^i over i with z_i > 0."""
    return ((z > 0) * _powers(z.shape[-1], z.device)).sum(-1)


def to_signs(ids: Tensor, bits: int) -> Tensor:
    """The inverse of `to_ids`: tokens `(...)` to signs `(..., bits)`, 1.0 or -1.0.

    Raises UserError when a token is not in [0, 2^bits).
    """
    if bool(((ids < 0) | (ids >= 2**bits)).any()):
        found = f"{int(ids.min())} to {int(ids.max())}"
        raise UserError(f"tokens of {bits} bits lie in [0, {2**bits}), got {found}; check their source")
    return torch.where(ids[..., None] & _powers(bits, ids.device) > 0, 1.0, -1.0)  # (..., bits)


def _powers(bits: int, device: torch.device) -> Tensor:
    return 2 ** torch.arange(bits, device=device)


def token_entropy(z: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Mean entropy of a token's word given its latent, E[H(q(z))], in nats, `()`; z `(..., d)`.

    The softmax over all words c of -|z - c|^2 / temperature is a product over bits, each set with probability
    sigmoid(4 z_i / temperature), so that its entropy is the sum of theirs, exactly (section 3.1).
    """
    x = 4 * z.float() / temperature
    p = x.sigmoid()
    # -log p is softplus(-x): no logarithm of a probability that has become 0.
    return (p * F.softplus(-x) + (1 - p) * F.softplus(x)).sum(-1).mean()


def word_probabilities(z: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """How often each word is expected in `z (..., d)`, E[q(z)], `(2^d,)`, exactly.

    Bits are independent given z, so the probabilities of a word's lower half and of its upper half multiply: the mean over N
    tokens is one product of matrices, (2^(d/2), N) by (N, 2^(d/2)). For d = 18 that is 1024 numbers per token, where all words
    would be 262,144; the paper's approximation by groups of bits is not needed.
    """
    x = (4 * z.float() / temperature).flatten(0, -2)  # (N, d)
    low, high = (_products(half) for half in x.tensor_split(2, dim=-1))  # (N, 2^(d/2)) each
    return (high.T @ low / len(x)).flatten()  # (2^d,)


def _products(x: Tensor) -> Tensor:
    """Probabilities of all patterns of bits with logits `(N, b)`, `(N, 2^b)`, the first bit the least significant."""
    table = x.new_ones(len(x), 1)
    for logit in x.unbind(-1):
        set_, unset = logit.sigmoid()[:, None], (-logit).sigmoid()[:, None]
        table = torch.cat([table * unset, table * set_], dim=-1)  # twice as many patterns
    return table


def batch_entropy(z: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Entropy of the words of a whole batch, H(E[q(z)]), in nats, `()`; z `(..., d)`.

    Not the sum of the bits' entropies, which is larger unless bits are independent over the batch. Raises UserError when words
    have more than `MOST_BITS` bits.
    """
    if z.shape[-1] > MOST_BITS:
        raise UserError(f"the entropy of {z.shape[-1]} bits needs the probability of every word; use {MOST_BITS} bits or fewer")
    p = word_probabilities(z, temperature)
    # Clamped: a word that never occurs adds 0, and its gradient must not be 0 times infinity.
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum()


def penalties(z: Tensor, temperature: float = TEMPERATURE) -> dict[str, Tensor]:
    """What training adds for latents `z (..., d)` before the sign, unweighted, each `()`.

    `entropy` is E[H(q(z))] - H(E[q(z)]) over this batch, at best -d ln 2; `commitment` the mean squared
    distance of z to its signs, as in VQ-VAE (van den Oord et al. 2017, equation 3). There is no codebook to train.
    """
    return {
        "entropy": token_entropy(z, temperature) - batch_entropy(z, temperature),
        "commitment": (z - quantize(z).detach()).square().mean(),
    }
